// The parts between // NAME and // end take the place of int8.h's parts of that name on a core with SMLAD and without an
// FPU. Projects get no line that begins with //.
/* int8 kernels in plain C, NHWC, for CPUs without an FPU and without instructions for several bytes. The same integers come
 * out on every CPU, and they are ONNX Runtime's: sums are exact, and
 *
 *   output = saturate(zero + rint((float)sum * ratio)),  rounded to float32 twice, then to even at a half.
 *
 * Integers find that, but for the few that are so near to a half that the roundings decide: see nn_requantise.
 */
#ifndef NN_INT8_H
#define NN_INT8_H

/* The generator's layout of weights (NN_LAYOUT) is 3: of convolutions two channels in turn, a weight of each for every
 * input; of depthwise ones for every channel every tap. */
#if NN_LAYOUT != 3
#error "the weights are for other kernels"
#endif

/* No inputs are widened. */
#define NN_WIDENS 0
#define NN_PIXELS(c) 0
#define NN_PATCH(c) 0
#define NN_MOST 0

typedef int8_t nn_value;
/* Outputs of a convolution that nn_dot computes together. */
enum { NN_TOGETHER = 2 };

/* What a sum of an output channel begins with, and input scale * weight scale / output scale. */
typedef struct {
  int32_t bias;
  float ratio;
} nn_scale;

/* A convolution. */
typedef struct {
  const int8_t *weights;
  const nn_scale *scales;
  int16_t channels_in, channels_out; /* channels_in of the input tensor */
  int16_t depth;                     /* products of one output, a multiple of 4 */
  int16_t width_in, height_in, width_out, height_out;
  int8_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, pad_right;
  int8_t direct;       /* 1x1 over channels by the four: no patch is gathered */
  int8_t pixels, wide; /* 0 */
  int8_t zero_in, zero_out, low, high;
} nn_conv;

/* output = saturate(rint(a * ratio_a + (b * ratio_b + fixed))), fused, for values as the model stores them:
 * ours and `offset`. */
typedef struct {
  float ratio_a, ratio_b, fixed;
  int16_t offset;
  int8_t low, high;
} nn_add;

NN_INLINE int8_t nn_saturate(int32_t value) { return (int8_t)(value < -128 ? -128 : value > 127 ? 127 : value); }

/* The nearest integer, the even one of two. */
NN_INLINE int32_t nn_round(float value) {
  /* Within these limits the sum's last bit is 1; what lies beyond saturates anyway. */
  const float limited = value < -256 ? -256 : value > 256 ? 256 : value;
  const float shifted = limited + 12582912.0f;
  int32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4B400000;
}

// requantise
/* As the formula says. */
NN_KERNEL int8_t nn_requantise_exactly(int32_t sum, float ratio, int32_t zero) {
  return nn_saturate(nn_round((float)sum * ratio) + zero);
}

/* The same. The two roundings to float32 move a number that does not saturate by less than 2^-15; only where a half is as
 * near as that do they matter. */
NN_KERNEL int8_t nn_requantise(int32_t sum, float ratio, int32_t zero) {
  uint32_t bits;
  memcpy(&bits, &ratio, sizeof bits);
  /* sum * ratio in units of 2^-16 is sum * mantissa >> shift. */
  const int32_t shift = 134 - (int32_t)(bits >> 23);
  if (shift < 0 || shift > 62) return nn_requantise_exactly(sum, ratio, zero);
  const int64_t units = ((int64_t)sum * (int32_t)((bits & 0x7FFFFFu) | 0x800000u)) >> shift;
  if (units >= 256 * 65536) return 127;
  if (units < -256 * 65536) return -128;
  const int32_t value = (int32_t)units;
  if ((uint32_t)(value & 0xFFFF) - 0x7FFEu < 4u) return nn_requantise_exactly(sum, ratio, zero);
  return nn_saturate(((value + 0x8000) >> 16) + zero);
}
// end

NN_INLINE void nn_clamp(int8_t *values, int32_t count, int32_t low, int32_t high) {
  if (low == -128 && high == 127) return;
  for (int32_t i = 0; i < count; i++) {
    if (values[i] < low) values[i] = (int8_t)low;
    if (values[i] > high) values[i] = (int8_t)high;
  }
}

/* Outside of the image. */
NN_INLINE void nn_fill(const nn_conv *c, int8_t *values, int32_t count) {
  memset(values, c->zero_in, (size_t)count);
}

/* Armv6-M has registers for the sums of one pixel and no more. */
#if defined(__ARM_ARCH_ISA_THUMB) && __ARM_ARCH_ISA_THUMB == 1
enum { NN_AT_ONCE = 1 };
#else
enum { NN_AT_ONCE = 2 };
#endif

/* Two channels from n on of the pixels at x and, where two are taken at once, y, which may be the same. */
NN_INLINE void nn_dot_pair(const nn_conv *c, const int8_t *x, const int8_t *y, int8_t *to_x, int8_t *to_y, int32_t n) {
  const int8_t *w = c->weights + n * c->depth, *const end = w + 2 * c->depth;
  const nn_scale *const scales = c->scales + n;
  const int last = n + 1 == c->channels_out;
  int32_t a = scales[0].bias, b = last ? 0 : scales[1].bias, d = a, e = b;
#define NN_ONE(k)                                            \
  do {                                                       \
    const int32_t u = w[2 * (k)], v = w[2 * (k) + 1];        \
    a += x[k] * u, b += x[k] * v;                            \
    if (NN_AT_ONCE == 2) d += y[k] * u, e += y[k] * v;       \
  } while (0)
  for (; w != end; w += 8, x += 4, y += 4) {
    NN_ONE(0);
    NN_ONE(1);
    NN_ONE(2);
    NN_ONE(3);
  }
  to_x[n] = nn_requantise(a, scales[0].ratio, c->zero_out);
  if (!last) to_x[n + 1] = nn_requantise(b, scales[1].ratio, c->zero_out);
  if (NN_AT_ONCE == 1) return;
  to_y[n] = nn_requantise(d, scales[0].ratio, c->zero_out);
  if (!last) to_y[n + 1] = nn_requantise(e, scales[1].ratio, c->zero_out);
}

/* Dot products: `pixels` vectors of `depth` bytes at x, each with every channel's weights; depth % 4 == 0. */
NN_KERNEL void nn_dot(const nn_conv *c, const int8_t *x, int8_t *out, int32_t pixels, int8_t *patch) {
  (void)patch;
  const int32_t channels = c->channels_out;
  for (int32_t p = 0; p < pixels; p += NN_AT_ONCE) {
    const int32_t next = p + 1 < pixels ? p + 1 : p;
    for (int32_t n = 0; n < channels; n += 2)
      nn_dot_pair(c, x + p * c->depth, x + next * c->depth, out + p * channels, out + next * channels, n);
  }
  nn_clamp(out, pixels * channels, c->low, c->high);
}

/* Channel n's output at column x of the padded rows. */
NN_INLINE int8_t nn_depthwise_one(const nn_conv *c, const int8_t *const *rows, int32_t x, int32_t n) {
  const int8_t *w = c->weights + n * c->depth;
  int32_t sum = c->scales[n].bias;
  for (int32_t ky = 0; ky < c->kernel_h; ky++)
    for (int32_t kx = 0; kx < c->kernel_w; kx++) sum += rows[ky][(x + kx) * c->channels_in + n] * *w++;
  return nn_requantise(sum, c->scales[n].ratio, c->zero_out);
}

/* One row of a depthwise convolution; `rows` begin at the left padding. */
NN_KERNEL void nn_depthwise(const nn_conv *c, const int8_t *const *rows, int8_t *out) {
  const int32_t channels = c->channels_in, step = c->stride_w;
  const int small = c->kernel_h == 3 && c->kernel_w == 3;
  for (int32_t n = 0; n < channels; n++) {
    const int8_t *const w = c->weights + n * c->depth;
    const int32_t bias = c->scales[n].bias, two = 2 * channels;
    const float ratio = c->scales[n].ratio;
    for (int32_t x = 0; x < c->width_out; x++) {
      int8_t *const to = out + x * channels + n;
      if (!small) {
        *to = nn_depthwise_one(c, rows, x * step, n);
        continue;
      }
      const int32_t at = x * step * channels + n;
      const int8_t *const a = rows[0] + at, *const b = rows[1] + at, *const d = rows[2] + at;
      *to = nn_requantise(bias + a[0] * w[0] + a[channels] * w[1] + a[two] * w[2] + b[0] * w[3] + b[channels] * w[4] +
                              b[two] * w[5] + d[0] * w[6] + d[channels] * w[7] + d[two] * w[8],
                          ratio, c->zero_out);
    }
  }
  nn_clamp(out, c->width_out * channels, c->low, c->high);
}

// addition
/* In double precision the products are exact, and each sum is rounded to float32 once. */
NN_KERNEL int32_t nn_add_exactly(const nn_add *d, int32_t a, int32_t b) {
  const float second = (float)((double)b * (double)d->ratio_b + (double)d->fixed);
  return nn_round((float)((double)a * (double)d->ratio_a + (double)second));
}

/* out may be a: element by element. Integers in units of 2^-20 are off by less than 600 of them, the roundings included;
 * they do where no half is as near as that. */
NN_KERNEL void nn_add_run(const nn_add *d, const int8_t *a, const int8_t *b, int8_t *out, int32_t count) {
  enum { UNIT = 1 << 20, HALF = UNIT / 2, NEAR = 600 };
  const float fixed = d->fixed < 0 ? -d->fixed : d->fixed;
  const int fits = 256 * (d->ratio_a + d->ratio_b) + fixed < 2000.0f;
  const int32_t first = fits ? (int32_t)(d->ratio_a * (float)UNIT) : 0;
  const int32_t second = fits ? (int32_t)(d->ratio_b * (float)UNIT) : 0;
  const int32_t rest = fits ? (int32_t)(d->fixed * (float)UNIT) : 0;
  for (int32_t i = 0; i < count; i++) {
    const int32_t x = a[i] + d->offset, y = b[i] + d->offset;
    const int32_t units = x * first + y * second + rest, part = (units & (UNIT - 1)) - HALF;
    const int sure = fits && (part > NEAR || part < -NEAR);
    out[i] = nn_saturate((sure ? (units + HALF) >> 20 : nn_add_exactly(d, x, y)) - d->offset);
  }
  nn_clamp(out, count, d->low, d->high);
}
// end

/* The mean over height and width; the requantisation divides. */
NN_KERNEL void nn_average(const nn_conv *c, const int8_t *x, int8_t *out) {
  const int32_t channels = c->channels_in, pixels = c->height_in * c->width_in;
  for (int32_t n = 0; n < channels; n++) {
    int32_t sum = c->scales->bias;
    for (int32_t p = 0; p < pixels; p++) sum += x[p * channels + n];
    out[n] = nn_requantise(sum, c->scales->ratio, c->zero_out);
  }
}

#endif
