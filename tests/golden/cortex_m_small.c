/* small: a test
 *
 * # steps, #,# multiply-adds, #,# bytes of arena.
 */
#include "small.h"

#define NN_LAYOUT # /* of the weights, see there */
#define NN_WIDE #
#define NN_OPERATORS "small_int8.h"
#include "small_kernels.h"
#include "golden.h"

extern const int8_t small_weights[#];
extern const nn_scale small_scales[#];

/* A hook for profiling: called before each step with its number, and after the last. */
#ifndef NN_STEP
#define NN_STEP(step) ((void)#)
#endif

/* a.project: # -> # */
static const nn_conv stem = {
    .weights = small_weights + #,
    .scales = small_scales + #,
    .channels_in = #, .channels_out = #, .depth = #,
    .width_in = #, .height_in = #, .width_out = #, .height_out = #,
    .kernel_h = #, .kernel_w = #, .stride_h = #, .stride_w = #,
    .pad_top = #, .pad_left = #, .pad_right = #, .direct = #,
    .zero_in = #, .zero_out = #, .low = #, .high = #,
    .pixels = #, .wide = #,
};
static const nn_conv a_depthwise = {
    .weights = small_weights + #,
    .scales = small_scales + #,
    .channels_in = #, .channels_out = #, .depth = #,
    .width_in = #, .height_in = #, .width_out = #, .height_out = #,
    .kernel_h = #, .kernel_w = #, .stride_h = #, .stride_w = #,
    .pad_top = #, .pad_left = #, .pad_right = #, .direct = #,
    .zero_in = #, .zero_out = #, .low = #, .high = #,
    .pixels = #, .wide = #,
};
static const nn_conv a_project = {
    .weights = small_weights + #,
    .scales = small_scales + #,
    .channels_in = #, .channels_out = #, .depth = #,
    .width_in = #, .height_in = #, .width_out = #, .height_out = #,
    .kernel_h = #, .kernel_w = #, .stride_h = #, .stride_w = #,
    .pad_top = #, .pad_left = #, .pad_right = #, .direct = #,
    .zero_in = #, .zero_out = #, .low = #, .high = #,
    .pixels = #, .wide = #,
};
static const nn_block a_project_step = {
    .expand = &stem,
    .depthwise = &a_depthwise,
    .project = &a_project,
    .residual = NULL,
    .ring = #, .row = #, .sum = #, .patch = #, .made = #,
    .spare = #, .input_second = #,
};

/* b.add: # -> # */
static const nn_conv b_expand = {
    .weights = small_weights + #,
    .scales = small_scales + #,
    .channels_in = #, .channels_out = #, .depth = #,
    .width_in = #, .height_in = #, .width_out = #, .height_out = #,
    .kernel_h = #, .kernel_w = #, .stride_h = #, .stride_w = #,
    .pad_top = #, .pad_left = #, .pad_right = #, .direct = #,
    .zero_in = #, .zero_out = #, .low = #, .high = #,
    .pixels = #, .wide = #,
};
static const nn_conv b_depthwise = {
    .weights = small_weights + #,
    .scales = small_scales + #,
    .channels_in = #, .channels_out = #, .depth = #,
    .width_in = #, .height_in = #, .width_out = #, .height_out = #,
    .kernel_h = #, .kernel_w = #, .stride_h = #, .stride_w = #,
    .pad_top = #, .pad_left = #, .pad_right = #, .direct = #,
    .zero_in = #, .zero_out = #, .low = #, .high = #,
    .pixels = #, .wide = #,
};
static const nn_conv b_project = {
    .weights = small_weights + #,
    .scales = small_scales + #,
    .channels_in = #, .channels_out = #, .depth = #,
    .width_in = #, .height_in = #, .width_out = #, .height_out = #,
    .kernel_h = #, .kernel_w = #, .stride_h = #, .stride_w = #,
    .pad_top = #, .pad_left = #, .pad_right = #, .direct = #,
    .zero_in = #, .zero_out = #, .low = #, .high = #,
    .pixels = #, .wide = #,
};
static const nn_add b_add_sum = {
    .ratio_a = #, .ratio_b = #, .fixed = #,
    .offset = #, .low = #, .high = #,
};
static const nn_block b_add_step = {
    .expand = &b_expand,
    .depthwise = &b_depthwise,
    .project = &b_project,
    .residual = &b_add_sum,
    .ring = #, .row = #, .sum = #, .patch = #, .made = #,
    .spare = #, .input_second = #,
};

/* c.project: # -> # */
static const nn_conv c_expand = {
    .weights = small_weights + #,
    .scales = small_scales + #,
    .channels_in = #, .channels_out = #, .depth = #,
    .width_in = #, .height_in = #, .width_out = #, .height_out = #,
    .kernel_h = #, .kernel_w = #, .stride_h = #, .stride_w = #,
    .pad_top = #, .pad_left = #, .pad_right = #, .direct = #,
    .zero_in = #, .zero_out = #, .low = #, .high = #,
    .pixels = #, .wide = #,
};
static const nn_conv c_depthwise = {
    .weights = small_weights + #,
    .scales = small_scales + #,
    .channels_in = #, .channels_out = #, .depth = #,
    .width_in = #, .height_in = #, .width_out = #, .height_out = #,
    .kernel_h = #, .kernel_w = #, .stride_h = #, .stride_w = #,
    .pad_top = #, .pad_left = #, .pad_right = #, .direct = #,
    .zero_in = #, .zero_out = #, .low = #, .high = #,
    .pixels = #, .wide = #,
};
static const nn_conv c_project = {
    .weights = small_weights + #,
    .scales = small_scales + #,
    .channels_in = #, .channels_out = #, .depth = #,
    .width_in = #, .height_in = #, .width_out = #, .height_out = #,
    .kernel_h = #, .kernel_w = #, .stride_h = #, .stride_w = #,
    .pad_top = #, .pad_left = #, .pad_right = #, .direct = #,
    .zero_in = #, .zero_out = #, .low = #, .high = #,
    .pixels = #, .wide = #,
};
static const nn_block c_project_step = {
    .expand = &c_expand,
    .depthwise = &c_depthwise,
    .project = &c_project,
    .residual = NULL,
    .ring = #, .row = #, .sum = #, .patch = #, .made = #,
    .spare = #, .input_second = #,
};

/* head: # -> # */
static const nn_conv head = {
    .weights = small_weights + #,
    .scales = small_scales + #,
    .channels_in = #, .channels_out = #, .depth = #,
    .width_in = #, .height_in = #, .width_out = #, .height_out = #,
    .kernel_h = #, .kernel_w = #, .stride_h = #, .stride_w = #,
    .pad_top = #, .pad_left = #, .pad_right = #, .direct = #,
    .zero_in = #, .zero_out = #, .low = #, .high = #,
    .pixels = #, .wide = #,
};
static const nn_block head_step = {
    .expand = &head,
    .depthwise = NULL,
    .project = NULL,
    .residual = NULL,
    .ring = #, .row = #, .sum = #, .patch = #, .made = #,
    .spare = #, .input_second = #,
};

/* pool: # -> # */
static const nn_conv pool_mean = {
    .scales = small_scales + #,
    .channels_in = #, .width_in = #, .height_in = #,
    .zero_out = #,
};

/* scores: # -> # */
static const nn_conv scores = {
    .weights = small_weights + #,
    .scales = small_scales + #,
    .channels_in = #, .channels_out = #, .depth = #,
    .width_in = #, .height_in = #, .width_out = #, .height_out = #,
    .kernel_h = #, .kernel_w = #, .stride_h = #, .stride_w = #,
    .pad_top = #, .pad_left = #, .pad_right = #, .direct = #,
    .zero_in = #, .zero_out = #, .low = #, .high = #,
    .pixels = #, .wide = #,
};
static const nn_block scores_step = {
    .expand = &scores,
    .depthwise = NULL,
    .project = NULL,
    .residual = NULL,
    .ring = #, .row = #, .sum = #, .patch = #, .made = #,
    .spare = #, .input_second = #,
};

static int overlap(const void *a, uintptr_t a_bytes, const void *b, uintptr_t b_bytes) {
  const uintptr_t p = (uintptr_t)a, q = (uintptr_t)b;
  return p < q + b_bytes && q < p + a_bytes;
}

int small_run(const int8_t *input, int8_t *output, void *arena) {
  int8_t *const base = (int8_t *)arena;
  if (input == NULL || output == NULL || arena == NULL) return SMALL_NULL;
  if ((uintptr_t)arena % SMALL_ARENA_ALIGNMENT != #) return SMALL_MISALIGNED;
  if (overlap(output, SMALL_OUTPUT_BYTES, arena, SMALL_ARENA_BYTES) ||
      overlap(output, SMALL_OUTPUT_BYTES, input, SMALL_INPUT_BYTES))
    return SMALL_OVERLAP;
  if (input != base + SMALL_INPUT_OFFSET && overlap(input, SMALL_INPUT_BYTES, arena, SMALL_ARENA_BYTES))
    return SMALL_OVERLAP;

  NN_STEP(#); /* a.project */
  nn_block_run(&a_project_step, input, base + #, base + #);
  NN_STEP(#); /* b.add */
  nn_block_run(&b_add_step, base + #, base + #, base + #);
  NN_STEP(#); /* c.project */
  nn_block_run(&c_project_step, base + #, base + #, base + #);
  NN_STEP(#); /* head */
  nn_block_run(&head_step, base + #, base + #, base + #);
  NN_STEP(#); /* pool */
  nn_average(&pool_mean, base + #, base + #);
  NN_STEP(#); /* scores */
  nn_block_run(&scores_step, base + #, output, base + #);
  NN_STEP(#);
  return SMALL_OK;
}

int small_self_test(int8_t *output, void *arena) {
  if (arena == NULL || output == NULL) return SMALL_NULL;
  uint32_t crc = nn_crc32(#, small_weights, sizeof small_weights);
  crc = nn_crc32(crc, small_scales, sizeof small_scales);
  if (crc != GOLDEN_CRC) return SMALL_WEIGHTS;
  int8_t *const input = (int8_t *)arena + SMALL_INPUT_OFFSET;
  for (uint32_t i = #; i < SMALL_INPUT_SIZE; i++) {
    const uint8_t byte = (uint8_t)((i * #) >> #); /* Knuth's multiplicative hash */
    memcpy(input + i, &byte, #);
  }
  const int code = small_run(input, output, arena);
  if (code != SMALL_OK) return code;
  for (uint32_t i = #; i < SMALL_OUTPUT_SIZE; i++)
    if (output[i] != golden_output[i]) return SMALL_WRONG;
  return SMALL_OK;
}
