/* Convolutions row by row, NHWC, int8 or float32: NN_OPERATORS names the header of what differs. */
#ifndef NN_KERNELS_H
#define NN_KERNELS_H

#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
#define NN_KERNEL static __attribute__((noinline, unused))
#define NN_INLINE static inline __attribute__((always_inline, unused))
#else
#define NN_KERNEL static
#define NN_INLINE static inline
#endif

#ifndef NN_TRACE
#define NN_TRACE(kind) ((void)0)
#endif
enum { NN_EXPAND, NN_DEPTHWISE, NN_PROJECT, NN_OTHER };

#include NN_OPERATORS

/* An inverted residual or a part of one; NULL where there is no such part. Offsets
 * into the scratch, in values. */
typedef struct {
  const nn_conv *expand, *depthwise, *project;
  const nn_add *residual;
  int32_t ring, row, sum, patch;
  int32_t made; /* in a chain: the row that the block before this one makes */
  int8_t spare; /* of a single convolution: nothing lies where rows of its output will be */
  int8_t input_second; /* the model adds the block's input to what it made, not that to its input: int8 rounds otherwise */
} nn_block;

/* memcpy for a few values: a call of it would take longer than the copy. */
NN_INLINE void nn_copy(nn_value *to, const nn_value *from, int32_t count) {
  enum { WORD = 4 / sizeof(nn_value) };
  for (; count >= WORD; count -= WORD, to += WORD, from += WORD) memcpy(to, from, 4);
  for (; count > 0; count--) *to++ = *from++;
}

/* What one output of a convolution looks at, side by side; the zero point outside the image. */
NN_KERNEL void nn_gather(const nn_conv *c, const nn_value *image, nn_value *patch, int32_t y, int32_t x) {
  const int32_t row = c->kernel_w * c->channels_in;
  int32_t before = -x, after = x + c->kernel_w - c->width_in;
  before = before < 0 ? 0 : before * c->channels_in;
  after = after < 0 ? 0 : after * c->channels_in;
  for (int32_t ky = 0; ky < c->kernel_h; ky++, patch += row) {
    if (y + ky < 0 || y + ky >= c->height_in) {
      nn_fill(c, patch, row);
      continue;
    }
    const int32_t from = ((y + ky) * c->width_in + x) * c->channels_in + before;
    if (before) nn_fill(c, patch, before);
    nn_copy(patch + before, image + from, row - before - after);
    if (after) nn_fill(c, patch + row - after, after);
  }
}

/* Row y of a convolution (group 1) of a whole image. */
NN_KERNEL void nn_conv_row(const nn_conv *c, const nn_value *image, nn_value *out, nn_value *patch, int32_t pixels, int32_t y) {
  if (c->direct) {
    nn_dot(c, image + y * c->width_in * c->channels_in, out, c->width_out, patch);
    return;
  }
#if NN_WIDENS
  for (int32_t x = 0, few; x < c->width_out; x += few) {
    few = nn_few(pixels, c->width_out - x);
    nn_prepare(c, image, (int32_t *)(void *)patch, few, y * c->stride_h - c->pad_top, x * c->stride_w - c->pad_left);
    nn_tiles(c, (int32_t *)(void *)patch, out + x * c->channels_out, few);
  }
  nn_clamp(out, c->width_out * c->channels_out, c->low, c->high);
#else
  (void)pixels;
  /* What rounds the depth up must be a number, though its weight is 0. */
  memset(patch, 0, (size_t)(NN_TOGETHER * c->depth) * sizeof *patch);
  const int32_t top = y * c->stride_h - c->pad_top;
  for (int32_t x = 0; x < c->width_out; x += NN_TOGETHER) {
    const int32_t pixels = c->width_out - x < NN_TOGETHER ? c->width_out - x : NN_TOGETHER;
    for (int32_t i = 0; i < pixels; i++)
      nn_gather(c, image, patch + i * c->depth, top, (x + i) * c->stride_w - c->pad_left);
    nn_dot(c, patch, out + x * c->channels_out, pixels, patch);
  }
#endif
}

#define NN_MAX_KERNEL 7

/* Row y of what the depthwise convolution reads has its padded place in the ring: the padding, and what comes between
 * it; NULL where the row is nothing but padding. */
NN_INLINE nn_value *nn_ring_row(const nn_block *b, nn_value *scratch, int32_t y) {
  const nn_conv *const d = b->depthwise;
  const int32_t row = d->width_in * d->channels_in;
  const int32_t left = d->pad_left * d->channels_in, right = d->pad_right * d->channels_in;
  nn_value *const slot = scratch + b->ring + (y + d->pad_top) % d->kernel_h * (left + row + right);
  if (y < 0 || y >= d->height_in) {
    nn_fill(d, slot, left + row + right);
    return NULL;
  }
  nn_fill(d, slot, left);
  nn_fill(d, slot + left + row, right);
  return slot + left;
}

/* Row y of the output, when the ring holds what it looks at; `own` is that row of the block's input. */
NN_KERNEL void nn_filter_row(const nn_block *b, const nn_value *own, nn_value *out, nn_value *scratch, int32_t y) {
  const nn_conv *const d = b->depthwise;
  const int32_t slot = (d->pad_left + d->width_in + d->pad_right) * d->channels_in;
  const nn_value *rows[NN_MAX_KERNEL];
  for (int32_t k = 0; k < d->kernel_h; k++)
    rows[k] = scratch + b->ring + (y * d->stride_h + k) % d->kernel_h * slot;
  /* No later row looks at this one. */
  nn_value *const patch = scratch + b->ring + y * d->stride_h % d->kernel_h * slot;
  nn_value *const filtered = b->project ? scratch + b->row : out;
  nn_depthwise(d, rows, filtered);
  NN_TRACE(NN_DEPTHWISE);
  if (b->project) {
    nn_value *const projected = b->residual ? scratch + b->sum : out;
    nn_dot(b->project, filtered, projected, d->width_out, patch);
    NN_TRACE(NN_PROJECT);
    if (b->residual)
      nn_add_run(b->residual, b->input_second ? projected : own, b->input_second ? own : projected, out,
                 d->width_out * b->project->channels_out);
  }
  NN_TRACE(NN_OTHER);
}

/* Row y of the output of a block with a depthwise convolution; `ready` is the next row to go into its ring. */
NN_INLINE void nn_block_row(const nn_block *b, const nn_value *in, nn_value *out, nn_value *scratch, int32_t *ready, int32_t y) {
  const nn_conv *const d = b->depthwise;
  const int32_t end = y * d->stride_h - d->pad_top + d->kernel_h;
  for (; *ready < end; ++*ready) {
    nn_value *const to = nn_ring_row(b, scratch, *ready);
    if (!to) continue;
    const int32_t row = d->width_in * d->channels_in;
    if (b->expand)
      nn_conv_row(b->expand, in, to, scratch + b->patch, NN_PIXELS(b->expand), *ready);
    else
      memcpy(to, in + *ready * row, (size_t)row * sizeof *to);
  }
  NN_TRACE(NN_EXPAND);
  nn_filter_row(b, b->residual ? in + y * d->width_out * b->project->channels_out : NULL, out, scratch, y);
}

NN_KERNEL void nn_block_run(const nn_block *b, const nn_value *in, nn_value *out, nn_value *scratch) {
  const nn_conv *const d = b->depthwise;
  if (!d) {
    const nn_conv *const c = b->expand;
    if (c->direct) {
      nn_dot(c, in, out, c->height_out * c->width_out, scratch + b->patch);
      return;
    }
    const int32_t row = c->width_out * c->channels_out;
    for (int32_t y = 0; y < c->height_out; y++) {
      nn_value *const to = out + y * row;
      const int spare = b->spare && (c->height_out - 1 - y) * row >= NN_PATCH(c);
      nn_conv_row(c, in, to, spare ? to + row : scratch + b->patch, spare ? NN_MOST : NN_PIXELS(c), y);
    }
    return;
  }
  const int32_t row = (b->project ? b->project->channels_out : d->channels_out) * d->width_out;
  int32_t ready = -d->pad_top;
  for (int32_t y = 0; y < d->height_out; y++) nn_block_row(b, in, out + y * row, scratch, &ready, y);
}

/* Two blocks, the second of which expands each row that the first makes, and only that row is kept. */
NN_KERNEL void nn_chain_run(const nn_block *first, const nn_block *second, const nn_value *in, nn_value *out, nn_value *scratch) {
  const nn_conv *const d = second->depthwise;
  const int32_t row = (second->project ? second->project->channels_out : d->channels_out) * d->width_out;
  nn_value *const made = scratch + second->made;
  int32_t ready = -first->depthwise->pad_top, second_ready = -d->pad_top;
  for (int32_t y = 0; y < d->height_out; y++) {
    for (; second_ready < y * d->stride_h - d->pad_top + d->kernel_h; second_ready++) {
      nn_value *const to = nn_ring_row(second, scratch, second_ready);
      if (!to) continue;
      nn_block_row(first, in, made, scratch, &ready, second_ready);
      nn_dot(second->expand, made, to, d->width_in, scratch + second->patch);
    }
    NN_TRACE(NN_EXPAND);
    nn_filter_row(second, NULL, out + y * row, scratch, y);
  }
}

/* CRC-32 (ISO 3309), bit by bit: small, and run once. */
NN_KERNEL uint32_t nn_crc32(uint32_t crc, const void *data, uint32_t size) {
  const uint8_t *bytes = (const uint8_t *)data;
  crc = ~crc;
  while (size--) {
    crc ^= *bytes++;
    for (int i = 0; i < 8; i++) crc = (crc >> 1) ^ (0xEDB88320u & (0u - (crc & 1u)));
  }
  return ~crc;
}

#endif
