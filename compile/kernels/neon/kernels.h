/* int8 operators for 64-bit ARM, channels last. Each is inlined into a function of its own with its sizes as
   constants; compile/kernels/neon/pack.py lays out what `parameters` point to. Longer than 450 lines: the functions
   are compiled as one unit, and `--dump` copies it next to the C that includes it. */

#ifndef NETSHIP_NEON_KERNELS_H
#define NETSHIP_NEON_KERNELS_H

#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("clang loop unroll(full)")

/* At the head of every operator's parameters. */
typedef struct {
  int32_t zero, low, high; /* of the output */
  int32_t input_zero;
  float ratios[3]; /* of operators without channels of their own */
} Head;
enum { HEAD = 64, LANES = 8, MOST_ROWS = 8 };

/* 8 channels' int32 biases and float32 ratios stand before their weights. */
enum { SCALES = 2 * 4 * LANES };

typedef struct {
  int16x8_t zero;
  int8x8_t low, high;
} Output;

INLINE Output output_of(const int8_t *parameters) {
  const Head *head = (const Head *)parameters;
  return (Output){vdupq_n_s16((int16_t)head->zero), vdup_n_s8((int8_t)head->low),
                  vdup_n_s8((int8_t)head->high)};
}

/* round(sum × ratio), halves to even; where `magic` every |sum| < 2²² holds 1.5 × 2²³ more, as a float's bits, and
   the result is less than 2¹⁵. */
INLINE int16x8_t scaled(int32x4_t a, int32x4_t b, float32x4_t ra, float32x4_t rb, int magic) {
  if (magic) {
    const float32x4_t half = vdupq_n_f32(12582912.0f);
    float32x4_t fa = vmulq_f32(vsubq_f32(vreinterpretq_f32_s32(a), half), ra);
    float32x4_t fb = vmulq_f32(vsubq_f32(vreinterpretq_f32_s32(b), half), rb);
    return vuzp1q_s16(vreinterpretq_s16_f32(vaddq_f32(fa, half)), vreinterpretq_s16_f32(vaddq_f32(fb, half)));
  }
  int32x4_t ia = vcvtnq_s32_f32(vmulq_f32(vcvtq_f32_s32(a), ra));
  int32x4_t ib = vcvtnq_s32_f32(vmulq_f32(vcvtq_f32_s32(b), rb));
  return vqmovn_high_s32(vqmovn_s32(ia), ib);
}

INLINE int8x8_t narrowed(int16x8_t steps, Output o, int clamped) {
  int8x8_t result = vqmovn_s16(vqaddq_s16(steps, o.zero));
  return clamped ? vmin_s8(vmax_s8(result, o.low), o.high) : result;
}

INLINE int8x8_t load(const int8_t *x, int count) {
  if (count >= LANES) return vld1_s8(x);
  int8_t all[LANES] = {0};
  UNROLLED for (int i = 0; i < count; i++) all[i] = x[i];
  return vld1_s8(all);
}

INLINE void store(int8_t *y, int8x8_t values, int count) {
  if (count >= LANES) {
    vst1_s8(y, values);
    return;
  }
  int8_t all[LANES];
  vst1_s8(all, values);
  UNROLLED for (int i = 0; i < count; i++) y[i] = all[i];
}

/* -- Convolutions as matrix products ---------------------------------------------------------------------------- */

typedef struct {
  int height, width, channels;
  int output_height, output_width, outputs;
  int kernel_height, kernel_width, stride_h, stride_w, top, left;
  int direct;      /* 1×1 of whole vectors: the input is the matrix */
  int depth;       /* of the matrix: kernel × channels, in whole vectors of 8 */
  int rows, band;  /* pixels in registers, and in the first-level cache */
  int by_channels; /* parallel over blocks of channels instead of pixels */
  int pairs;       /* two products fit 16 bits */
  int magic, clamped;
} Convolution;

/* `rows` pixels × 8 channels. */
INLINE void tile(const int8_t *x, int stride, const int8_t *block, int8_t *y, int count, int rows, Output o,
                 Convolution c) {
  const int32_t *biases = (const int32_t *)block;
  const float *ratios = (const float *)block + LANES;
  const int8_t *w = block + SCALES;
  const int32x4_t low_bias = vld1q_s32(biases), high_bias = vld1q_s32(biases + 4);
#if defined(__ARM_FEATURE_DOTPROD)
  int32x4_t low[MOST_ROWS], high[MOST_ROWS];
  UNROLLED for (int r = 0; r < rows; r++) low[r] = low_bias, high[r] = high_bias;
#define FOUR(LANE, DOT)                                            \
  {                                                                \
    int8x16_t wl = vld1q_s8(w), wh = vld1q_s8(w + 16);             \
    w += 32;                                                       \
    UNROLLED for (int r = 0; r < rows; r++) {                      \
      low[r] = DOT(low[r], wl, a[r], LANE);                        \
      high[r] = DOT(high[r], wh, a[r], LANE);                      \
    }                                                              \
  }
  int k = 0;
  for (; k + 16 <= c.depth; k += 16) {
    int8x16_t a[MOST_ROWS];
    UNROLLED for (int r = 0; r < rows; r++) a[r] = vld1q_s8(x + r * stride + k);
    FOUR(0, vdotq_laneq_s32)
    FOUR(1, vdotq_laneq_s32)
    FOUR(2, vdotq_laneq_s32)
    FOUR(3, vdotq_laneq_s32)
  }
  if (k < c.depth) {
    int8x8_t a[MOST_ROWS];
    UNROLLED for (int r = 0; r < rows; r++) a[r] = vld1_s8(x + r * stride + k);
    FOUR(0, vdotq_lane_s32)
    FOUR(1, vdotq_lane_s32)
  }
#undef FOUR
#else
  int32x4_t sums[MOST_ROWS][LANES], low[MOST_ROWS], high[MOST_ROWS];
  int k = 0;
#define SIXTEEN(START)                                                                 \
  {                                                                                    \
    int8x16_t a[MOST_ROWS];                                                            \
    UNROLLED for (int r = 0; r < rows; r++) a[r] = vld1q_s8(x + r * stride + k);       \
    UNROLLED for (int n = 0; n < LANES; n++) {                                         \
      int8x16_t b = vld1q_s8(w + 16 * n);                                              \
      UNROLLED for (int r = 0; r < rows; r++) {                                        \
        int16x8_t products = vmull_s8(vget_low_s8(a[r]), vget_low_s8(b));              \
        int16x8_t others = c.pairs ? products : vmull_high_s8(a[r], b);                \
        if (c.pairs) products = vmlal_high_s8(products, a[r], b);                      \
        sums[r][n] = START ? vpaddlq_s16(products) : vpadalq_s16(sums[r][n], products); \
        if (!c.pairs) sums[r][n] = vpadalq_s16(sums[r][n], others);                    \
      }                                                                                \
    }                                                                                  \
    w += 16 * LANES;                                                                   \
    k += 16;                                                                           \
  }
#define EIGHT(START)                                                                   \
  UNROLLED for (int n = 0; n < LANES; n++) {                                           \
    int8x8_t b = vld1_s8(w + 8 * n);                                                   \
    UNROLLED for (int r = 0; r < rows; r++) {                                          \
      int16x8_t products = vmull_s8(vld1_s8(x + r * stride + k), b);                   \
      sums[r][n] = START ? vpaddlq_s16(products) : vpadalq_s16(sums[r][n], products);  \
    }                                                                                  \
  }
  if (c.depth < 16) {
    EIGHT(1)
  } else {
    SIXTEEN(1)
    while (k + 16 <= c.depth) SIXTEEN(0)
    if (k < c.depth) EIGHT(0)
  }
#undef SIXTEEN
#undef EIGHT
  UNROLLED for (int r = 0; r < rows; r++) {
    const int32x4_t *s = sums[r];
    low[r] = vaddq_s32(vpaddq_s32(vpaddq_s32(s[0], s[1]), vpaddq_s32(s[2], s[3])), low_bias);
    high[r] = vaddq_s32(vpaddq_s32(vpaddq_s32(s[4], s[5]), vpaddq_s32(s[6], s[7])), high_bias);
  }
#endif
  const float32x4_t low_ratio = vld1q_f32(ratios), high_ratio = vld1q_f32(ratios + 4);
  UNROLLED for (int r = 0; r < rows; r++) {
    int16x8_t steps = scaled(low[r], high[r], low_ratio, high_ratio, c.magic);
    store(y + r * c.outputs, narrowed(steps, o, c.clamped), count);
  }
}

/* `count` bytes, a constant. */
INLINE void copy(int8_t *to, const int8_t *from, int count) {
  int k = 0;
  for (; k + 16 <= count; k += 16) vst1q_s8(to + k, vld1q_s8(from + k));
  if (count & 8) vst1_s8(to + k, vld1_s8(from + k)), k += 8;
  UNROLLED for (; k < count; k++) to[k] = from[k];
}

/* The rows of a matrix for the output pixels from `first` to before `last`: what each sums over, side by side. */
INLINE void gather(const int8_t *x, int first, int last, int8_t *to, int8_t padding, Convolution c) {
  const int row = c.kernel_width * c.channels;
  int out_row = first / c.output_width, out_column = first % c.output_width;
  for (int p = first; p < last; p++, to += c.depth) {
    const int top = out_row * c.stride_h - c.top, left = out_column * c.stride_w - c.left;
    const int8_t *from = x + ((ptrdiff_t)top * c.width + left) * c.channels;
    if (top >= 0 && top + c.kernel_height <= c.height && left >= 0 && left + c.kernel_width <= c.width) {
      for (int i = 0; i < c.kernel_height; i++) copy(to + i * row, from + (ptrdiff_t)i * c.width * c.channels, row);
    } else {
      for (int i = 0; i < c.kernel_height; i++) {
        for (int j = 0; j < c.kernel_width; j++) {
          const int inside = top + i >= 0 && top + i < c.height && left + j >= 0 && left + j < c.width;
          for (int k = 0; k < c.channels; k++)
            to[i * row + j * c.channels + k] =
                inside ? from[((ptrdiff_t)i * c.width + j) * c.channels + k] : padding;
        }
      }
    }
    if (++out_column == c.output_width) out_column = 0, out_row++;
  }
}

/* Pixels in steps of `rows`, or blocks of 8 channels, from `first` to before `last`. */
INLINE void convolution(int first, int last, const int8_t *x, const int8_t *parameters, int8_t *y, Convolution c) {
  const Output o = output_of(parameters);
  const int blocks = (c.outputs + LANES - 1) / LANES, pixels = c.output_height * c.output_width;
  const int block_bytes = SCALES + LANES * c.depth;
  const int from = c.by_channels ? first : 0, to = c.by_channels ? last : blocks;
  const int begin = c.by_channels ? 0 : first * c.rows;
  const int end = c.by_channels || last * c.rows > pixels ? pixels : last * c.rows;
  const int8_t padding = (int8_t)((const Head *)parameters)->input_zero;
  int8_t gathered[c.direct ? 1 : c.band * c.depth] __attribute__((aligned(64)));
  if (!c.direct) {
    const int used = c.kernel_height * c.kernel_width * c.channels;
    for (int p = 0; p < c.band; p++) {
      for (int k = used; k < c.depth; k++) gathered[p * c.depth + k] = 0;
    }
  }
  for (int p = begin; p < end; p += c.band) {
    const int stop = p + c.band < end ? p + c.band : end;
    const int8_t *matrix = x + (ptrdiff_t)p * c.depth;
    if (!c.direct) {
      gather(x, p, stop, gathered, padding, c);
      matrix = gathered;
    }
    for (int n = from; n < to; n++) {
      const int8_t *block = parameters + HEAD + n * block_bytes;
      const int8_t *row = matrix;
      int8_t *out = y + (ptrdiff_t)p * c.outputs + n * LANES;
      const int partial = n == blocks - 1 ? c.outputs % LANES : 0;
      int i = p;
      for (; i + c.rows <= stop; i += c.rows, row += c.rows * c.depth, out += c.rows * c.outputs) {
        if (c.outputs % LANES && partial)
          tile(row, c.depth, block, out, c.outputs % LANES, c.rows, o, c);
        else
          tile(row, c.depth, block, out, LANES, c.rows, o, c);
      }
      if (pixels % c.rows && i < stop) {
        if (c.outputs % LANES && partial)
          tile(row, c.depth, block, out, c.outputs % LANES, pixels % c.rows, o, c);
        else
          tile(row, c.depth, block, out, LANES, pixels % c.rows, o, c);
      }
    }
  }
}

/* -- Depthwise convolutions ------------------------------------------------------------------------------------- */

typedef struct {
  int height, width, channels;
  int output_height, output_width;
  int kernel_height, kernel_width, stride_h, stride_w, top, left;
  int slab, columns; /* channels and output columns whose rows are kept in the first-level cache */
  int dots;          /* 3×3 by SDOT: the three pixels of a column are summed as one */
  int pairs, magic, clamped;
} Depthwise;

/* Of each channel: its bias, its ratio, its weights. */
INLINE int channel_bytes(Depthwise c) { return 8 + (c.dots ? 12 : c.kernel_height * c.kernel_width); }

/* `width` pixels of one row, 8 channels (or 16 where `wide`) from `rows`, which hold `slab` channels a pixel. */
INLINE void filter(const int8_t *const *rows, int slab, int width, const int8_t *block, int8_t *y, int count, int wide,
                   Output o, Depthwise c) {
  const int lanes = wide ? 16 : 8, taps = c.kernel_height * c.kernel_width, quads = lanes / 4;
  const int32_t *biases = (const int32_t *)block;
  const float *ratios = (const float *)block + lanes;
  /* A 3×3 kernel stays in registers. */
  const int kept = taps <= 9;
  int8x16_t weights[9];
  UNROLLED for (int t = 0; kept && t < taps; t++)
    weights[t] = wide ? vld1q_s8(block + (8 + t) * lanes) : vcombine_s8(vld1_s8(block + (8 + t) * lanes), vdup_n_s8(0));
  int32x4_t bias[4];
  float32x4_t ratio[4];
  UNROLLED for (int q = 0; q < quads; q++) bias[q] = vld1q_s32(biases + 4 * q), ratio[q] = vld1q_f32(ratios + 4 * q);
  for (int column = 0; column < width; column++) {
    int32x4_t sums[4];
    UNROLLED for (int q = 0; q < quads; q++) sums[q] = bias[q];
    UNROLLED for (int t = 0; t < taps; t += 1 + c.pairs) {
      int16x8_t low, high;
      UNROLLED for (int s = t; s < taps && s <= t + c.pairs; s++) {
        const int8_t *from =
            rows[s / c.kernel_width] + (column * c.stride_w + s % c.kernel_width) * slab;
        if (wide) {
          int8x16_t a = vld1q_s8(from), b = kept ? weights[s] : vld1q_s8(block + (8 + s) * 16);
          low = s == t ? vmull_s8(vget_low_s8(a), vget_low_s8(b)) : vmlal_s8(low, vget_low_s8(a), vget_low_s8(b));
          high = s == t ? vmull_high_s8(a, b) : vmlal_high_s8(high, a, b);
        } else {
          int8x8_t a = vld1_s8(from), b = kept ? vget_low_s8(weights[s]) : vld1_s8(block + (8 + s) * 8);
          low = s == t ? vmull_s8(a, b) : vmlal_s8(low, a, b);
        }
      }
      sums[0] = vaddw_s16(sums[0], vget_low_s16(low));
      sums[1] = vaddw_high_s16(sums[1], low);
      if (wide) {
        sums[2] = vaddw_s16(sums[2], vget_low_s16(high));
        sums[3] = vaddw_high_s16(sums[3], high);
      }
    }
    int8x8_t results[2];
    UNROLLED for (int h = 0; h < lanes / 8; h++) {
      int16x8_t steps = scaled(sums[2 * h], sums[2 * h + 1], ratio[2 * h], ratio[2 * h + 1], c.magic);
      results[h] = narrowed(steps, o, c.clamped);
    }
    if (wide)
      vst1q_s8(y + (ptrdiff_t)column * c.channels, vcombine_s8(results[0], results[1]));
    else
      store(y + (ptrdiff_t)column * c.channels, results[0], count);
  }
}

#if defined(__ARM_FEATURE_DOTPROD)
/* One column of 8 channels from three rows: four bytes each, of which the last has weight 0. */
INLINE int8x16x2_t column_of(const int8_t *const *rows, int at) {
  int8x16_t a = vcombine_s8(vld1_s8(rows[0] + at), vdup_n_s8(0));
  int8x16_t b = vcombine_s8(vld1_s8(rows[1] + at), vdup_n_s8(0));
  int8x16_t d = vcombine_s8(vld1_s8(rows[2] + at), vdup_n_s8(0));
  int16x8_t upper = vreinterpretq_s16_s8(vzip1q_s8(a, b)), lower = vreinterpretq_s16_s8(vzip1q_s8(d, d));
  return (int8x16x2_t){{vreinterpretq_s8_s16(vzip1q_s16(upper, lower)), vreinterpretq_s8_s16(vzip2q_s16(upper, lower))}};
}

INLINE void filter_dots(const int8_t *const *rows, int slab, int width, const int8_t *block, int8_t *y, int count,
                        Output o, Depthwise c) {
  const int32_t *biases = (const int32_t *)block;
  const float *ratios = (const float *)block + LANES;
  const int32x4_t low_bias = vld1q_s32(biases), high_bias = vld1q_s32(biases + 4);
  const float32x4_t low_ratio = vld1q_f32(ratios), high_ratio = vld1q_f32(ratios + 4);
  int8x16_t w[6];
  UNROLLED for (int i = 0; i < 6; i++) w[i] = vld1q_s8(block + SCALES + 16 * i);
  int8x16x2_t first = column_of(rows, 0), second = column_of(rows, slab);
  _Pragma("clang loop unroll_count(3)") for (int column = 0; column < width; column++) {
    const int at = column * c.stride_w * slab;
    if (c.stride_w == 2 && column) second = column_of(rows, at + slab);
    const int8x16x2_t third = column_of(rows, at + 2 * slab);
    int32x4_t low = vdotq_s32(vdotq_s32(vdotq_s32(low_bias, first.val[0], w[0]), second.val[0], w[2]), third.val[0], w[4]);
    int32x4_t high =
        vdotq_s32(vdotq_s32(vdotq_s32(high_bias, first.val[1], w[1]), second.val[1], w[3]), third.val[1], w[5]);
    store(y + (ptrdiff_t)column * c.channels,
          narrowed(scaled(low, high, low_ratio, high_ratio, c.magic), o, c.clamped), count);
    first = c.stride_w == 2 ? third : second;
    second = third;
  }
}
#endif

/* Columns from `left` on, `slab` channels each, padded; `count` of the channels are the input's. */
INLINE void copy_row(int8_t *to, const int8_t *x, int row, int left, int columns, int slab, int count, int8x16_t padding,
                     Depthwise c) {
  for (int j = left; j < left + columns; j++, to += slab) {
    if (row < 0 || row >= c.height || j < 0 || j >= c.width) {
      UNROLLED for (int k = 0; k + 16 <= slab; k += 16) vst1q_s8(to + k, padding);
      if (slab % 16) vst1_s8(to + slab - 8, vget_low_s8(padding));
    } else {
      copy(to, x + ((ptrdiff_t)row * c.width + j) * c.channels, count);
      UNROLLED for (int k = count; k < slab; k++) to[k] = 0;
    }
  }
}

/* The channels of one slab: `slab`, a multiple of 8, of which `count` are the output's. */
INLINE void filter_slab(int first, int last, const int8_t *x, const int8_t *blocks, int8_t *y, int left, int width,
                        int slab, int count, int8x16_t padding, Output o, Depthwise c) {
  const int room = (c.columns - 1) * c.stride_w + c.kernel_width, columns = (width - 1) * c.stride_w + c.kernel_width;
  int8_t ring[c.kernel_height * room * slab] __attribute__((aligned(64)));
  int next = first * c.stride_h - c.top;
  for (int row = first; row < last; row++) {
    const int above = row * c.stride_h - c.top;
    if (next < above) next = above;
    const int8_t *rows[MOST_KERNEL];
    for (; next < above + c.kernel_height; next++) {
      const int slot = (next + c.top) % c.kernel_height;
      copy_row(ring + slot * room * slab, x, next, left * c.stride_w - c.left, columns, slab, count, padding, c);
    }
    UNROLLED for (int i = 0; i < c.kernel_height; i++)
      rows[i] = ring + (above + c.top + i) % c.kernel_height * room * slab;
    int8_t *out = y + ((ptrdiff_t)row * c.output_width + left) * c.channels;
    const int8_t *block = blocks;
#if defined(__ARM_FEATURE_DOTPROD)
    if (c.dots) {
      for (int k = 0; k < count; k += LANES, block += LANES * channel_bytes(c)) {
        const int8_t *shifted[MOST_KERNEL];
        UNROLLED for (int i = 0; i < c.kernel_height; i++) shifted[i] = rows[i] + k;
        if (count % LANES && k + LANES > count)
          filter_dots(shifted, slab, width, block, out + k, count % LANES, o, c);
        else
          filter_dots(shifted, slab, width, block, out + k, LANES, o, c);
      }
      continue;
    }
#endif
    for (int k = 0; k + 16 <= count; k += 16, block += 16 * channel_bytes(c)) {
      const int8_t *shifted[MOST_KERNEL];
      UNROLLED for (int i = 0; i < c.kernel_height; i++) shifted[i] = rows[i] + k;
      filter(shifted, slab, width, block, out + k, 16, 1, o, c);
    }
    UNROLLED for (int k = count / 16 * 16; k < count; k += 8, block += 8 * channel_bytes(c)) {
      const int8_t *shifted[MOST_KERNEL];
      UNROLLED for (int i = 0; i < c.kernel_height; i++) shifted[i] = rows[i] + k;
      filter(shifted, slab, width, block, out + k, count - k, 0, o, c);
    }
  }
}

/* Output rows from `first` to before `last`. */
INLINE void depthwise(int first, int last, const int8_t *x, const int8_t *parameters, int8_t *y, Depthwise c) {
  const Output o = output_of(parameters);
  const int8x16_t padding = vdupq_n_s8((int8_t)((const Head *)parameters)->input_zero);
  const int rest = c.channels % c.slab;
  for (int left = 0; left < c.output_width; left += c.columns) {
    const int width = left + c.columns < c.output_width ? c.columns : c.output_width - left;
    int k = 0;
    for (; k + c.slab <= c.channels; k += c.slab)
      filter_slab(first, last, x + k, parameters + HEAD + k * channel_bytes(c), y + k, left, width, c.slab, c.slab, padding, o,
                  c);
    if (rest)
      filter_slab(first, last, x + k, parameters + HEAD + k * channel_bytes(c), y + k, left, width, (rest + 7) / 8 * 8, rest,
                  padding, o, c);
  }
}

/* -- The rest ----------------------------------------------------------------------------------------------------- */

typedef struct {
  int size; /* elements */
  int a_offset, b_offset, output_offset; /* what the values that the ratios are for are above int8 */
  int magic, clamped;
} Addition;

/* The four floats of each quarter of 8 bytes, a constant higher. */
INLINE void floats(int8x8_t x, int offset, float32x4_t *low, float32x4_t *high) {
#if defined(__ARM_FEATURE_DOTPROD)
  /* 2²³ + u has u as its last bits. */
  const uint16x8_t exponent = vdupq_n_u16(0x4B00);
  const float32x4_t base = vdupq_n_f32(8388608.0f + 128.0f - (float)offset);
  uint16x8_t wide = vmovl_u8(veor_u8(vreinterpret_u8_s8(x), vdup_n_u8(128)));
  *low = vsubq_f32(vreinterpretq_f32_u16(vzip1q_u16(wide, exponent)), base);
  *high = vsubq_f32(vreinterpretq_f32_u16(vzip2q_u16(wide, exponent)), base);
#else
  int16x8_t wide = offset ? vreinterpretq_s16_u16(vmovl_u8(veor_u8(vreinterpret_u8_s8(x), vdup_n_u8(128)))) : vmovl_s8(x);
  *low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  *high = vcvtq_f32_s32(vmovl_high_s16(wide));
#endif
}

INLINE int8x8_t added(int8x8_t a, int8x8_t b, const float *ratios, Output o, Addition c) {
  float32x4_t sums[2], al, ah, bl, bh;
  floats(a, c.a_offset, &al, &ah);
  floats(b, c.b_offset, &bl, &bh);
  const float32x4_t ra = vdupq_n_f32(ratios[0]), rb = vdupq_n_f32(ratios[1]), fixed = vdupq_n_f32(ratios[2]);
  sums[0] = vfmaq_f32(vfmaq_f32(fixed, bl, rb), al, ra);
  sums[1] = vfmaq_f32(vfmaq_f32(fixed, bh, rb), ah, ra);
  int16x8_t steps;
  if (c.magic) {
    const float32x4_t half = vdupq_n_f32(12582912.0f);
    steps = vuzp1q_s16(vreinterpretq_s16_f32(vaddq_f32(sums[0], half)), vreinterpretq_s16_f32(vaddq_f32(sums[1], half)));
  } else {
    steps = vqmovn_high_s32(vqmovn_s32(vcvtnq_s32_f32(sums[0])), vcvtnq_s32_f32(sums[1]));
  }
  int8x8_t result = vqmovn_s16(c.output_offset ? vqsubq_s16(steps, vdupq_n_s16((int16_t)c.output_offset)) : steps);
  return c.clamped ? vmin_s8(vmax_s8(result, o.low), o.high) : result;
}

/* Elements in steps of 16, from `first` to before `last`. */
INLINE void addition(int first, int last, const int8_t *a, const int8_t *b, const int8_t *parameters, int8_t *y,
                     Addition c) {
  const Output o = output_of(parameters);
  const float *ratios = ((const Head *)parameters)->ratios;
  const int whole = c.size / 16;
  for (int i = first; i < (last < whole ? last : whole); i++) {
    int8x16_t va = vld1q_s8(a + 16 * i), vb = vld1q_s8(b + 16 * i);
    vst1q_s8(y + 16 * i, vcombine_s8(added(vget_low_s8(va), vget_low_s8(vb), ratios, o, c),
                                     added(vget_high_s8(va), vget_high_s8(vb), ratios, o, c)));
  }
  if (c.size % 16 && last > whole) {
    UNROLLED for (int k = 16 * whole; k < c.size; k += LANES)
      store(y + k, added(load(a + k, c.size - k), load(b + k, c.size - k), ratios, o, c), c.size - k);
  }
}

typedef struct {
  int pixels, channels;
} Average;

INLINE int8x8_t averaged(const int8_t *x, int count, const Head *head, Output o, Average c) {
  const int32x4_t zero = vdupq_n_s32(-c.pixels * head->input_zero);
  int32x4_t low = zero, high = zero;
  for (int p = 0; p < c.pixels;) {
    /* 255 int8 fit 16 bits. */
    const int stop = c.pixels - p > 255 ? p + 255 : c.pixels;
    int16x8_t sums = vdupq_n_s16(0);
    for (; p < stop; p++) sums = vaddw_s8(sums, load(x + (ptrdiff_t)p * c.channels, count));
    low = vaddw_s16(low, vget_low_s16(sums));
    high = vaddw_high_s16(high, sums);
  }
  const float32x4_t ratio = vdupq_n_f32(head->ratios[0]);
  return narrowed(scaled(low, high, ratio, ratio, 0), o, 0);
}

/* Channels in steps of 8, from `first` to before `last`. */
INLINE void average(int first, int last, const int8_t *x, const int8_t *parameters, int8_t *y, Average c) {
  const Output o = output_of(parameters);
  const Head *head = (const Head *)parameters;
  const int whole = c.channels / LANES;
  for (int i = first; i < (last < whole ? last : whole); i++)
    vst1_s8(y + LANES * i, averaged(x + LANES * i, LANES, head, o, c));
  if (c.channels % LANES && last > whole)
    store(y + LANES * whole, averaged(x + LANES * whole, c.channels % LANES, head, o, c), c.channels % LANES);
}

typedef struct {
  int height, width, channels;
  int reciprocal; /* the division by the scale may be two multiplications */
} Quantisation;

/* x ÷ scale as a division rounds it: twice the quotient's own error, exact in fused arithmetic, is put right by the
   rounded reciprocal (P. Markstein, Computation of elementary functions on the IBM RISC System/6000 processor, IBM
   Journal of Research and Development 34 (1990), 111). */
INLINE int32x4_t quotient(float32x4_t x, const float *head, Quantisation c) {
  const float32x4_t scale = vdupq_n_f32(head[0]), reciprocal = vdupq_n_f32(head[1]), limit = vdupq_n_f32(head[2]);
  if (!c.reciprocal) return vcvtnq_s32_f32(vdivq_f32(x, scale));
  x = vmaxq_f32(vminq_f32(x, limit), vnegq_f32(limit));
  float32x4_t q = vmulq_f32(x, reciprocal);
  q = vfmaq_f32(q, vfmsq_f32(x, q, scale), reciprocal);
  q = vfmaq_f32(q, vfmsq_f32(x, q, scale), reciprocal);
  return vcvtnq_s32_f32(q);
}

INLINE int8x8_t quantised(const float *x, const float *head, Output o, Quantisation c) {
  int32x4_t low = quotient(vld1q_f32(x), head, c), high = quotient(vld1q_f32(x + 4), head, c);
  return narrowed(vqmovn_high_s32(vqmovn_s32(low), high), o, 0);
}

/* Rows from `first` to before `last`, from float32 [channels, height, width]. */
INLINE void quantise(int first, int last, const float *x, const int8_t *parameters, int8_t *y, Quantisation c) {
  const Output o = output_of(parameters);
  const float *head = ((const Head *)parameters)->ratios;
  const ptrdiff_t plane = (ptrdiff_t)c.height * c.width;
  const int end = last * c.width;
  for (int p = first * c.width; p < end; p += LANES) {
    const int count = end - p < LANES ? end - p : LANES;
    if (c.channels == 3 && count == LANES) {
      int8x8x3_t three;
      UNROLLED for (int k = 0; k < 3; k++) three.val[k] = quantised(x + k * plane + p, head, o, c);
      vst3_s8(y + 3 * (ptrdiff_t)p, three);
      continue;
    }
    for (int k = 0; k < c.channels; k++) {
      float values[LANES] = {0};
      int8_t results[LANES];
      for (int i = 0; i < count; i++) values[i] = x[k * plane + p + i];
      vst1_s8(results, quantised(values, head, o, c));
      for (int i = 0; i < count; i++) y[(ptrdiff_t)(p + i) * c.channels + k] = results[i];
    }
  }
}

#endif
