// Longer than 450 lines: a generated project has all of its int8 kernels in one header. Projects get it without
// these two lines.
/* int8 kernels, NHWC. The same integers come out on every CPU, and they are ONNX Runtime's: sums are exact, and
 *
 *   output = saturate(zero + rint((float)sum * ratio)),  rounded to float32 twice, then to even at a half.
 *
 * Without an FPU the compiler's own routines do that, slowly.
 */
#ifndef NN_INT8_H
#define NN_INT8_H

/* How the generator laid out the weights, see nn_weight and nn_tap:
 * 1, for SMLAD: convolutions in words of four weights, two channels in turn; depthwise ones widened to
 *    int16, for every four channels and every tap those of channels 0, 2, 1, 3.
 * 2, for MVE: convolutions in vectors of sixteen weights, four channels in turn; depthwise ones for every
 *    eight channels and every tap. */
#ifndef NN_LAYOUT
#define NN_LAYOUT 1
#endif

#if defined(__ARM_FEATURE_MVE) && (__ARM_FEATURE_MVE & 2) && NN_LAYOUT == 2 && !defined(NN_PORTABLE)
#define NN_MVE 1
#include <arm_mve.h>
#else
#define NN_MVE 0
#endif
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_ARCH_PROFILE) && __ARM_ARCH_PROFILE == 'M' && NN_LAYOUT == 1 && !defined(NN_PORTABLE)
#define NN_DSP 1
#else
#define NN_DSP 0
#endif

#if NN_DSP && defined(__ARM_FP)
#define NN_FPU 1
#else
#define NN_FPU 0
#endif

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
  int8_t direct; /* 1x1 over whole words: no patch is gathered */
  int8_t zero_in, zero_out, low, high;
} nn_conv;

/* output = saturate(rint(a * ratio_a + (b * ratio_b + fixed))), fused, for values as the model stores them:
 * ours and `offset`. */
typedef struct {
  float ratio_a, ratio_b, fixed;
  int16_t offset;
  int8_t low, high;
} nn_add;

NN_INLINE int8_t nn_saturate(int32_t value) {
#if NN_DSP
  int32_t saturated;
  __asm__("ssat %0, #8, %1" : "=r"(saturated) : "r"(value));
  return (int8_t)saturated;
#else
  return (int8_t)(value < -128 ? -128 : value > 127 ? 127 : value);
#endif
}

/* The nearest integer, the even one of two. */
NN_INLINE int32_t nn_round(float value) {
#if NN_FPU
  int32_t rounded;
  __asm__("vcvtr.s32.f32 %1, %1\n\tvmov %0, %1" : "=r"(rounded), "+t"(value));
  return rounded;
#else
  /* Within these limits the sum's last bit is 1; what lies beyond saturates anyway. */
  const float limited = value < -256 ? -256 : value > 256 ? 256 : value;
  const float shifted = limited + 12582912.0f;
  int32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4B400000;
#endif
}

NN_INLINE int8_t nn_requantise(int32_t sum, float ratio, int32_t zero) {
  return nn_saturate(nn_round((float)sum * ratio) + zero);
}

/* Four sums times their ratios, rounded. */
#if NN_FPU
#define NN_SCALE4(a, b, c, d, ratio_a, ratio_b, ratio_c, ratio_d)                               \
  __asm__("vmov s0, s1, %0, %1\n\tvmov s2, s3, %2, %3\n\t"                                     \
          "vcvt.f32.s32 s0, s0\n\tvcvt.f32.s32 s1, s1\n\t"                                     \
          "vcvt.f32.s32 s2, s2\n\tvcvt.f32.s32 s3, s3\n\t"                                     \
          "vmul.f32 s0, s0, %4\n\tvmul.f32 s1, s1, %5\n\t"                                     \
          "vmul.f32 s2, s2, %6\n\tvmul.f32 s3, s3, %7\n\t"                                     \
          "vcvtr.s32.f32 s0, s0\n\tvcvtr.s32.f32 s1, s1\n\t"                                   \
          "vcvtr.s32.f32 s2, s2\n\tvcvtr.s32.f32 s3, s3\n\t"                                   \
          "vmov %0, %1, s0, s1\n\tvmov %2, %3, s2, s3"                                         \
          : "+r"(a), "+r"(b), "+r"(c), "+r"(d)                                                 \
          : "t"(ratio_a), "t"(ratio_b), "t"(ratio_c), "t"(ratio_d)                             \
          : "s0", "s1", "s2", "s3")
#else
#define NN_SCALE4(a, b, c, d, ratio_a, ratio_b, ratio_c, ratio_d)                    \
  (a = nn_round((float)(a) * (ratio_a)), b = nn_round((float)(b) * (ratio_b)),       \
   c = nn_round((float)(c) * (ratio_c)), d = nn_round((float)(d) * (ratio_d)))
#endif

NN_INLINE void nn_clamp(int8_t *values, int32_t count, int32_t low, int32_t high) {
  if (low == -128 && high == 127) return;
  for (int32_t i = 0; i < count; i++) {
    if (values[i] < low) values[i] = (int8_t)low;
    if (values[i] > high) values[i] = (int8_t)high;
  }
}

#if NN_MVE
/* Sums of which each begins with its bias, times their ratios, rounded, and zero. */
NN_INLINE int32x4_t nn_scaled4(int32x4_t sums, float32x4_t ratios, int32_t zero) {
  return vaddq_n_s32(vcvtnq_s32_f32(vmulq_f32(vcvtq_f32_s32(sums), ratios)), zero);
}

/* Four sums of one pixel, without their biases, to four bytes. */
NN_INLINE void nn_store4(int32x4_t sums, const nn_scale *scales, int32_t zero, int8_t *out) {
  const int32x4x2_t constants = vld2q_s32(&scales->bias);
  sums = nn_scaled4(vaddq_s32(sums, constants.val[0]), vreinterpretq_f32_s32(constants.val[1]), zero);
  /* Only the lowest byte of each lane is stored. */
  const int16x8_t halves = vqmovnbq_s32(vreinterpretq_s16_s32(sums), sums);
  const int8x16_t bytes = vqmovnbq_s16(vreinterpretq_s8_s16(halves), halves);
  vstrbq_s32(out, vreinterpretq_s32_s8(bytes));
}
#endif

/* Outside of the image. */
NN_INLINE void nn_fill(const nn_conv *c, int8_t *values, int32_t count) {
  memset(values, c->zero_in, (size_t)count);
}

/* Channel n's weight k of a convolution. */
NN_INLINE int32_t nn_weight(const nn_conv *c, int32_t n, int32_t k) {
#if NN_LAYOUT == 1
  return c->weights[(n / 2 * c->depth + k / 4 * 4) * 2 + n % 2 * 4 + k % 4];
#else
  return c->weights[((n / 4 * ((c->depth + 15) / 16) + k / 16) * 4 + n % 4) * 16 + k % 16];
#endif
}

/* Channel n's output for the pixel at x. */
NN_INLINE int8_t nn_dot_one(const nn_conv *c, const int8_t *x, int32_t n) {
  int32_t sum = c->scales[n].bias;
  for (int32_t k = 0; k < c->depth; k++) sum += x[k] * nn_weight(c, n, k);
  return nn_requantise(sum, c->scales[n].ratio, c->zero_out);
}

#if NN_DSP
/* Four inputs of two pixels `next` + 4 bytes apart, with four weights of two channels: sums of
 * (pixel 0, channel 0), (0, 1), (1, 0), (1, 1). 19 instructions, 16 multiply-adds. */
#define NN_DOT_2X2(x, w, next, s00, s01, s10, s11)                                                    \
  do {                                                                                                \
    int32_t a_, b_, u_, v_, c_;                                                                       \
    __asm__("ldrd %[u], %[v], [%[wp]], #8\n\t"                                                        \
            "ldr %[a], [%[xp]], #4\n\t"                                                               \
            "sxtb16 %[b], %[u], ror #8\n\t"                                                           \
            "sxtb16 %[u], %[u]\n\t"                                                                   \
            "sxtb16 %[c], %[a], ror #8\n\t"                                                           \
            "sxtb16 %[a], %[a]\n\t"                                                                   \
            "smlad %[p], %[c], %[b], %[p]\n\t"                                                        \
            "smlad %[p], %[a], %[u], %[p]\n\t"                                                        \
            "sxtb16 %[t], %[v], ror #8\n\t"                                                           \
            "sxtb16 %[v], %[v]\n\t"                                                                   \
            "smlad %[q], %[c], %[t], %[q]\n\t"                                                        \
            "smlad %[q], %[a], %[v], %[q]\n\t"                                                        \
            "ldr %[a], [%[xp], %[n]]\n\t"                                                             \
            "sxtb16 %[c], %[a], ror #8\n\t"                                                           \
            "sxtb16 %[a], %[a]\n\t"                                                                   \
            "smlad %[r], %[c], %[b], %[r]\n\t"                                                        \
            "smlad %[r], %[a], %[u], %[r]\n\t"                                                        \
            "smlad %[s], %[c], %[t], %[s]\n\t"                                                        \
            "smlad %[s], %[a], %[v], %[s]"                                                            \
            : [p] "+r"(s00), [q] "+r"(s01), [r] "+r"(s10), [s] "+r"(s11), [xp] "+r"(x), [wp] "+r"(w),  \
              [a] "=&r"(a_), [b] "=&r"(b_), [u] "=&r"(u_), [v] "=&r"(v_), [c] "=&r"(c_), [t] "=&r"(t_) \
            : [n] "r"(next)                                                                           \
            : "memory");                                                                              \
  } while (0)

/* The same for one pixel. */
#define NN_DOT_1X2(x, w, s0, s1)                                                         \
  do {                                                                                   \
    int32_t a_, b_, u_, v_;                                                              \
    __asm__("ldrd %[u], %[v], [%[wp]], #8\n\t"                                           \
            "ldr %[a], [%[xp]], #4\n\t"                                                  \
            "sxtb16 %[b], %[a], ror #8\n\t"                                              \
            "sxtb16 %[a], %[a]\n\t"                                                      \
            "sxtb16 %[t], %[u], ror #8\n\t"                                              \
            "sxtb16 %[u], %[u]\n\t"                                                      \
            "smlad %[p], %[b], %[t], %[p]\n\t"                                           \
            "smlad %[p], %[a], %[u], %[p]\n\t"                                           \
            "sxtb16 %[t], %[v], ror #8\n\t"                                              \
            "sxtb16 %[v], %[v]\n\t"                                                      \
            "smlad %[q], %[b], %[t], %[q]\n\t"                                           \
            "smlad %[q], %[a], %[v], %[q]"                                               \
            : [p] "+r"(s0), [q] "+r"(s1), [xp] "+r"(x), [wp] "+r"(w), [a] "=&r"(a_),     \
              [b] "=&r"(b_), [u] "=&r"(u_), [v] "=&r"(v_), [t] "=&r"(t_)                 \
            :                                                                            \
            : "memory");                                                                 \
  } while (0)
#endif

/* Dot products: `pixels` vectors of `depth` bytes at x, each with every channel's weights; depth % 4 == 0. */
NN_KERNEL void nn_dot(const nn_conv *c, const int8_t *x, int8_t *out, int32_t pixels) {
  const int32_t depth = c->depth, channels = c->channels_out;
  int8_t *const first = out;
#if NN_MVE
  const int32_t zero = c->zero_out, whole = (depth - 1) / 16 * 16;
  const mve_pred16_t rest = vctp8q((uint32_t)(depth - whole));
  for (int32_t p = 0; p < pixels; p++, x += depth) {
    const int8_t *w = c->weights;
    const nn_scale *r = c->scales;
    const int8x16_t tail = vldrbq_z_s8(x + whole, rest);
    int32_t n = 0;
    for (; n + 4 <= channels; n += 4, out += 4, r += 4, w += 64) {
      int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (const int8_t *a = x; a != x + whole; a += 16, w += 64) {
        const int8x16_t v = vldrbq_s8(a);
        s0 = vmladavaq_s8(s0, v, vldrbq_s8(w));
        s1 = vmladavaq_s8(s1, v, vldrbq_s8(w + 16));
        s2 = vmladavaq_s8(s2, v, vldrbq_s8(w + 32));
        s3 = vmladavaq_s8(s3, v, vldrbq_s8(w + 48));
      }
      s0 = vmladavaq_s8(s0, tail, vldrbq_s8(w));
      s1 = vmladavaq_s8(s1, tail, vldrbq_s8(w + 16));
      s2 = vmladavaq_s8(s2, tail, vldrbq_s8(w + 32));
      s3 = vmladavaq_s8(s3, tail, vldrbq_s8(w + 48));
      int32x4_t sums = vdupq_n_s32(s0);
      sums = vsetq_lane_s32(s1, sums, 1);
      sums = vsetq_lane_s32(s2, sums, 2);
      sums = vsetq_lane_s32(s3, sums, 3);
      nn_store4(sums, r, zero, out);
    }
    for (; n < channels; n++) *out++ = nn_dot_one(c, x, n);
  }
#elif NN_DSP
  const int32_t zero = c->zero_out, next = depth - 4;
  int32_t p = 0;
  for (; p + 2 <= pixels; p += 2, x += 2 * depth, out += channels) {
    const int8_t *w = c->weights;
    const nn_scale *r = c->scales;
    int8_t *const end = out + (channels & ~1);
    for (; out != end; out += 2, r += 2) {
      int32_t s00 = r[0].bias, s01 = r[1].bias, s10 = s00, s11 = s01, t_;
      const int8_t *a = x;
      const int8_t *const last = x + depth;
      if (depth & 4) NN_DOT_2X2(a, w, next, s00, s01, s10, s11);
      while (a != last) {
        NN_DOT_2X2(a, w, next, s00, s01, s10, s11);
        NN_DOT_2X2(a, w, next, s00, s01, s10, s11);
      }
      NN_SCALE4(s00, s01, s10, s11, r[0].ratio, r[1].ratio, r[0].ratio, r[1].ratio);
      out[0] = nn_saturate(s00 + zero);
      out[1] = nn_saturate(s01 + zero);
      out[channels] = nn_saturate(s10 + zero);
      out[channels + 1] = nn_saturate(s11 + zero);
    }
    if (channels & 1) {
      out[channels] = nn_dot_one(c, x + depth, channels - 1);
      *out++ = nn_dot_one(c, x, channels - 1);
    }
  }
  if (p < pixels) {
    const int8_t *w = c->weights;
    const nn_scale *r = c->scales;
    int8_t *const end = out + (channels & ~1);
    for (; out != end; out += 2, r += 2) {
      int32_t s0 = r[0].bias, s1 = r[1].bias, t_;
      const int8_t *a = x;
      const int8_t *const last = x + depth;
      if (depth & 4) NN_DOT_1X2(a, w, s0, s1);
      while (a != last) {
        NN_DOT_1X2(a, w, s0, s1);
        NN_DOT_1X2(a, w, s0, s1);
      }
      out[0] = nn_requantise(s0, r[0].ratio, zero);
      out[1] = nn_requantise(s1, r[1].ratio, zero);
    }
    if (channels & 1) *out = nn_dot_one(c, x, channels - 1);
  }
#else
  for (int32_t p = 0; p < pixels; p++, x += depth)
    for (int32_t n = 0; n < channels; n++) *out++ = nn_dot_one(c, x, n);
#endif
  nn_clamp(first, pixels * channels, c->low, c->high);
}

/* Channel n's weight at a tap of a depthwise convolution. */
NN_INLINE int32_t nn_tap(const nn_conv *c, int32_t tap, int32_t n) {
#if NN_LAYOUT == 1
  static const int8_t place[4] = {0, 2, 1, 3};
  int16_t weight;
  memcpy(&weight, c->weights + ((n / 4 * c->depth + tap) * 4 + place[n % 4]) * 2, sizeof weight);
  return weight;
#else
  return c->weights[(n / 8 * c->depth + tap) * 8 + n % 8];
#endif
}

/* Channel n's output at column x of the padded rows. */
NN_INLINE int8_t nn_depthwise_one(const nn_conv *c, const int8_t *const *rows, int32_t x, int32_t n) {
  int32_t sum = c->scales[n].bias;
  for (int32_t ky = 0; ky < c->kernel_h; ky++)
    for (int32_t kx = 0; kx < c->kernel_w; kx++)
      sum += rows[ky][(x + kx) * c->channels_in + n] * nn_tap(c, ky * c->kernel_w + kx, n);
  return nn_requantise(sum, c->scales[n].ratio, c->zero_out);
}

#if NN_DSP
/* Three taps side by side, `step` bytes apart, of four channels with widened weights at w: sums of channels
 * 0 to 3. 24 instructions, 12 multiply-adds. */
#define NN_TAPS_TAP(load)                        \
  load                                           \
  "ldrd %[u], %[v], [%[wp]], #8\n\t"             \
  "sxtb16 %[b], %[a], ror #8\n\t"                \
  "sxtb16 %[a], %[a]\n\t"                        \
  "smlabb %[p], %[a], %[u], %[p]\n\t"            \
  "smlatt %[r], %[a], %[u], %[r]\n\t"            \
  "smlabb %[q], %[b], %[v], %[q]\n\t"            \
  "smlatt %[s], %[b], %[v], %[s]\n\t"
#define NN_TAPS(row, step, w, s0, s1, s2, s3)                                                  \
  do {                                                                                         \
    int32_t a_, b_, u_, v_;                                                                    \
    __asm__(NN_TAPS_TAP("ldr %[a], [%[x]]\n\t")                                                \
            NN_TAPS_TAP("ldr %[a], [%[x], %[n]]\n\t")                                          \
            NN_TAPS_TAP("ldr %[a], [%[x], %[n], lsl #1]\n\t")                                  \
            : [p] "+r"(s0), [q] "+r"(s1), [r] "+r"(s2), [s] "+r"(s3), [wp] "+r"(w),            \
              [a] "=&r"(a_), [b] "=&r"(b_), [u] "=&r"(u_), [v] "=&r"(v_)                       \
            : [x] "r"(row), [n] "r"(step)                                                      \
            : "memory");                                                                       \
  } while (0)
#endif

/* One row of a depthwise convolution; `rows` begin at the left padding. */
NN_KERNEL void nn_depthwise(const nn_conv *c, const int8_t *const *rows, int8_t *out) {
  const int32_t channels = c->channels_in;
  const int32_t step = c->stride_w;
  int8_t *const first = out;
#if NN_MVE || NN_DSP
  const int32_t zero = c->zero_out;
  const int fast = c->kernel_h == 3 && c->kernel_w == 3;
#endif
#if NN_MVE
  const uint32x4_t fours = vmulq_n_u32(vidupq_n_u32(0, 1), 4);
#endif
  for (int32_t x = 0; x < c->width_out; x++) {
    int32_t n = 0;
#if NN_MVE
    if (fast) {
      const int32_t at = x * step * channels;
      const int8_t *r0 = rows[0] + at, *r1 = rows[1] + at, *r2 = rows[2] + at, *w = c->weights;
      const nn_scale *r = c->scales;
      for (; n + 8 <= channels; n += 8, r0 += 8, r1 += 8, r2 += 8, out += 8, r += 8, w += 72) {
        int32x4_t even = vldrwq_gather_shifted_offset_s32(&r[0].bias, fours);
        int32x4_t odd = vldrwq_gather_shifted_offset_s32(&r[1].bias, fours);
#define NN_TAP8(row, k, tap)                                                 \
  do {                                                                       \
    const int16x8_t a_ = vldrbq_s16((row) + (k) * channels);                 \
    const int16x8_t w_ = vldrbq_s16(w + 8 * (tap));                          \
    even = vaddq_s32(even, vmullbq_int_s16(a_, w_));                         \
    odd = vaddq_s32(odd, vmulltq_int_s16(a_, w_));                           \
    /* Or the compiler loads all taps first and runs out of registers. */    \
    __asm__ volatile("" ::: "memory");                                       \
  } while (0)
        NN_TAP8(r0, 0, 0);
        NN_TAP8(r0, 1, 1);
        NN_TAP8(r0, 2, 2);
        NN_TAP8(r1, 0, 3);
        NN_TAP8(r1, 1, 4);
        NN_TAP8(r1, 2, 5);
        NN_TAP8(r2, 0, 6);
        NN_TAP8(r2, 1, 7);
        NN_TAP8(r2, 2, 8);
        even = nn_scaled4(even, vldrwq_gather_shifted_offset_f32(&r[0].ratio, fours), zero);
        odd = nn_scaled4(odd, vldrwq_gather_shifted_offset_f32(&r[1].ratio, fours), zero);
        const int16x8_t halves = vqmovntq_s32(vqmovnbq_s32(vreinterpretq_s16_s32(even), even), odd);
        vstrbq_s16(out, vreinterpretq_s16_s8(vqmovnbq_s16(vreinterpretq_s8_s16(halves), halves)));
      }
    }
#elif NN_DSP
    if (fast) {
      const int32_t at = x * step * channels;
      const int8_t *r0 = rows[0] + at, *r1 = rows[1] + at, *r2 = rows[2] + at;
      const int8_t *w = c->weights;
      const nn_scale *r = c->scales;
      for (; n + 4 <= channels; n += 4, r0 += 4, r1 += 4, r2 += 4, out += 4, r += 4) {
        int32_t s0 = r[0].bias, s1 = r[1].bias, s2 = r[2].bias, s3 = r[3].bias;
        NN_TAPS(r0, channels, w, s0, s1, s2, s3);
        NN_TAPS(r1, channels, w, s0, s1, s2, s3);
        NN_TAPS(r2, channels, w, s0, s1, s2, s3);
        NN_SCALE4(s0, s1, s2, s3, r[0].ratio, r[1].ratio, r[2].ratio, r[3].ratio);
        out[0] = nn_saturate(s0 + zero);
        out[1] = nn_saturate(s1 + zero);
        out[2] = nn_saturate(s2 + zero);
        out[3] = nn_saturate(s3 + zero);
      }
    }
#endif
    for (; n < channels; n++) *out++ = nn_depthwise_one(c, rows, x * step, n);
  }
  nn_clamp(first, c->width_out * channels, c->low, c->high);
}

/* x * ratio + sum, rounded to float32 once; x is a byte. */
NN_INLINE float nn_fma(int32_t x, float ratio, float sum) {
#if NN_FPU
  __asm__("vfma.f32 %0, %1, %2" : "+t"(sum) : "t"((float)x), "t"(ratio));
  return sum;
#else
  /* In double precision the product is exact. */
  return (float)((double)x * (double)ratio + (double)sum);
#endif
}

/* out may be a: element by element. */
NN_KERNEL void nn_add_run(const nn_add *d, const int8_t *a, const int8_t *b, int8_t *out, int32_t count) {
  const float ratio_a = d->ratio_a, ratio_b = d->ratio_b, fixed = d->fixed;
  const int32_t offset = d->offset;
  int32_t i = 0;
#if NN_MVE
  for (; i < count; i += 4) {
    const mve_pred16_t rest = vctp32q((uint32_t)(count - i));
    const float32x4_t x = vcvtq_f32_s32(vaddq_n_s32(vldrbq_z_s32(a + i, rest), offset));
    const float32x4_t y = vcvtq_f32_s32(vaddq_n_s32(vldrbq_z_s32(b + i, rest), offset));
    const float32x4_t total = vfmaq_n_f32(vfmaq_n_f32(vdupq_n_f32(fixed), y, ratio_b), x, ratio_a);
    const int32x4_t sums = vsubq_n_s32(vcvtnq_s32_f32(total), offset);
    const int16x8_t halves = vqmovnbq_s32(vdupq_n_s16(0), sums);
    vstrbq_p_s32(out + i, vreinterpretq_s32_s8(vqmovnbq_s16(vdupq_n_s8(0), halves)), rest);
  }
#else
  for (; i < count; i++) {
    const float total = nn_fma(a[i] + offset, ratio_a, nn_fma(b[i] + offset, ratio_b, fixed));
    out[i] = nn_saturate(nn_round(total) - offset);
  }
#endif
  nn_clamp(out, count, d->low, d->high);
}

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
