// Included behind CMSIS-NN's sources: one function a kind of layer, with the parameters that TFLite Micro would pass.

#include <string.h>

extern const int8_t cmsis_weights[];

struct layer {
  int32_t h, w, c, out_h, out_w, out_c, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, weights;
};

enum { CHANNELS = 640, SCRATCH = 16384, MULTIPLIER = 1518500250, SHIFT = -7, ZERO = 5 };
static int8_t tensors[4][BIGGEST] __attribute__((aligned(16)));
static int8_t scratch[SCRATCH] __attribute__((aligned(16)));
static int32_t multipliers[CHANNELS], shifts[CHANNELS];
static const cmsis_nn_activation CLAMP = {-128, 127};

// TFLite Micro has them from its preparation.
static const cmsis_nn_per_channel_quant_params *channels(void) {
  static const cmsis_nn_per_channel_quant_params quantised = {multipliers, shifts};
  if (!multipliers[0])
    for (int i = 0; i < CHANNELS; i++) multipliers[i] = MULTIPLIER, shifts[i] = SHIFT;
  return &quantised;
}

static const int32_t *biases(const struct layer *l, int32_t inputs) {
  return (const int32_t *)(cmsis_weights + l->weights + l->out_c * l->kernel_h * l->kernel_w * inputs);
}

static void convolve(const struct layer *l, const int8_t *in, const int8_t *other, int8_t *out) {
  const cmsis_nn_context context = {scratch, SCRATCH};
  const cmsis_nn_conv_params parameters = {
      ZERO, -ZERO, {l->stride_w, l->stride_h}, {l->pad_w, l->pad_h}, {1, 1}, CLAMP};
  const cmsis_nn_dims input = {1, l->h, l->w, l->c}, filter = {l->out_c, l->kernel_h, l->kernel_w, l->c},
                      bias = {1, 1, 1, l->out_c}, output = {1, l->out_h, l->out_w, l->out_c};
  (void)other;
  arm_convolve_wrapper_s8(&context, &parameters, channels(), &input, in, &filter, cmsis_weights + l->weights, &bias,
                          biases(l, l->c), &output, out);
}

static void depthwise_conv(const struct layer *l, const int8_t *in, const int8_t *other, int8_t *out) {
  const cmsis_nn_context context = {scratch, SCRATCH};
  const cmsis_nn_dw_conv_params parameters = {
      ZERO, -ZERO, 1, {l->stride_w, l->stride_h}, {l->pad_w, l->pad_h}, {1, 1}, CLAMP};
  const cmsis_nn_dims input = {1, l->h, l->w, l->c}, filter = {1, l->kernel_h, l->kernel_w, l->out_c},
                      bias = {1, 1, 1, l->out_c}, output = {1, l->out_h, l->out_w, l->out_c};
  (void)other;
  arm_depthwise_conv_wrapper_s8(&context, &parameters, channels(), &input, in, &filter, cmsis_weights + l->weights,
                                &bias, biases(l, 1), &output, out);
}

static void fully_connected(const struct layer *l, const int8_t *in, const int8_t *other, int8_t *out) {
  const cmsis_nn_context context = {scratch, SCRATCH};
  const cmsis_nn_fc_params parameters = {ZERO, 0, -ZERO, CLAMP};
  const cmsis_nn_per_tensor_quant_params quantised = {MULTIPLIER, SHIFT};
  const int32_t inputs = l->h * l->w * l->c;
  const cmsis_nn_dims input = {1, 1, 1, inputs}, filter = {inputs, 1, 1, l->out_c}, bias = {1, 1, 1, l->out_c},
                      output = {1, 1, 1, l->out_c};
  (void)other;
  arm_fully_connected_s8(&context, &parameters, &quantised, &input, in, &filter, cmsis_weights + l->weights, &bias,
                         biases(l, inputs), &output, out);
}

static void elementwise_add(const struct layer *l, const int8_t *in, const int8_t *other, int8_t *out) {
  arm_elementwise_add_s8(in, other, ZERO, MULTIPLIER, -1, -ZERO, MULTIPLIER, -1, 20, out, ZERO, MULTIPLIER, -18, -128,
                         127, l->out_h * l->out_w * l->out_c);
}

static void avgpool(const struct layer *l, const int8_t *in, const int8_t *other, int8_t *out) {
  const cmsis_nn_context context = {scratch, SCRATCH};
  const cmsis_nn_pool_params parameters = {{l->stride_w, l->stride_h}, {0, 0}, CLAMP};
  const cmsis_nn_dims input = {1, l->h, l->w, l->c}, filter = {1, l->kernel_h, l->kernel_w, 1},
                      output = {1, l->out_h, l->out_w, l->out_c};
  (void)other;
  arm_avgpool_s8(&context, &parameters, &input, in, &filter, &output, out);
}

static void softmax(const struct layer *l, const int8_t *in, const int8_t *other, int8_t *out) {
  (void)other;
  arm_softmax_s8(in, 1, l->out_c, MULTIPLIER, 23, -248, out);
}

int cmsis_self_test(int8_t *output, void *arena) {
  (void)output, (void)arena;
  return 0;
}
