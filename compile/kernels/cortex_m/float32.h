/* float32 kernels, NHWC. A sum begins with the bias and takes one fused multiply-add after the other: along the
 * depth in a convolution, row by row in a depthwise one. So every CPU that has them gives the same bits.
 *
 * Weights of convolutions lie for every four channels and every input those of the four; of depthwise ones for
 * every four channels and every tap.
 */
#ifndef NN_FLOAT32_H
#define NN_FLOAT32_H

#include <stddef.h>

#if defined(__ARM_ARCH_PROFILE) && __ARM_ARCH_PROFILE == 'M'
#define NN_CORTEX_M 1
#else
#define NN_CORTEX_M 0
#endif
#if NN_CORTEX_M && !defined(__ARM_FP)
#error "float32 needs a core with an FPU: compile with -mfloat-abi=hard, or build the network with --quantize int8"
#endif

/* Without optimisation a compiler runs out of registers. */
#if defined(__ARM_FEATURE_MVE) && (__ARM_FEATURE_MVE & 2) && defined(__OPTIMIZE__) && !defined(NN_PORTABLE)
#define NN_MVE 1
#include <arm_mve.h>
#else
#define NN_MVE 0
#endif
#if NN_CORTEX_M && !NN_MVE && defined(__OPTIMIZE__) && !defined(NN_PORTABLE)
#define NN_FPU 1
#else
#define NN_FPU 0
#endif

typedef float nn_value;
/* Whether nn_dot copies its inputs first. */
#define NN_WIDENS 0
#define NN_PIXELS(c) 0
#define NN_PATCH(c) 0
#define NN_MOST 0
/* Outputs of a convolution that nn_dot computes together. */
enum { NN_TOGETHER = 4 };

/* A convolution, its output limited from limits[0] to limits[1] where `limited`. */
typedef struct {
  const float *weights, *bias;
  float limits[2];
  int16_t channels_in, channels_out; /* channels_in of the input tensor */
  int16_t depth;                     /* products of one output, a multiple of 4 */
  int16_t width_in, height_in, width_out, height_out;
  int8_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, pad_right;
  int8_t direct; /* 1x1 over channels by the four: no patch is gathered */
  int8_t limited;
} nn_conv;

/* output = a + b, limited likewise */
typedef struct {
  float limits[2];
} nn_add;

/* a * b + sum, rounded once where the CPU can; without the instruction the product is rounded too. */
NN_INLINE float nn_fma(float a, float b, float sum) {
#if NN_CORTEX_M
  __asm__("vfma.f32 %0, %1, %2" : "+t"(sum) : "t"(a), "t"(b));
  return sum;
#elif defined(__ARM_FEATURE_FMA) || defined(__FMA__)
  return __builtin_fmaf(a, b, sum);
#else
  return a * b + sum;
#endif
}

NN_INLINE float nn_limit(float value, const float *limits) {
  return value < limits[0] ? limits[0] : value > limits[1] ? limits[1] : value;
}

/* Outside of the image. */
NN_INLINE void nn_fill(const nn_conv *c, float *values, int32_t count) {
  (void)c;
  memset(values, 0, (size_t)count * sizeof *values);
}

/* Channel n's output for the pixel at x. */
NN_INLINE float nn_dot_one(const nn_conv *c, const float *x, int32_t n) {
  const float *const w = c->weights + n / 4 * 4 * c->depth + n % 4;
  float sum = c->bias[n];
  for (int32_t k = 0; k < c->depth; k++) sum = nn_fma(x[k], w[4 * k], sum);
  return nn_limit(sum, c->limits);
}

#if NN_FPU
/* Double precision or Armv8-M: the FPU has VMAXNM. */
#if (__ARM_FP & 8) || __ARM_ARCH >= 8
#define NN_LIMIT(value) "vmaxnm.f32 " value ", " value ", s16\n\tvminnm.f32 " value ", " value ", s17\n\t"
#else
#define NN_LIMIT(value)                                                                             \
  "vcmp.f32 " value ", s16\n\tvmrs APSR_nzcv, fpscr\n\tit mi\n\tvmovmi.f32 " value ", s16\n\t"      \
  "vcmp.f32 " value ", s17\n\tvmrs APSR_nzcv, fpscr\n\tit gt\n\tvmovgt.f32 " value ", s17\n\t"
#endif
/* To label 2 where nothing limits; else s16 and s17 are the limits. */
#define NN_IF_LIMITED(free)                                                                         \
  "ldrsb " free ", [%[c], %[limited]]\n\tcmp " free ", #0\n\tbeq 2f\n\t"                            \
  "vldr s16, [%[c], %[low]]\n\tvldr s17, [%[c], %[high]]\n\t"
#define NN_OF(convolution)                                                                          \
  [c] "r"(convolution), [limited] "i"(offsetof(nn_conv, limited)), [low] "i"(offsetof(nn_conv, limits)), \
      [high] "i"(offsetof(nn_conv, limits) + sizeof(float)), [channels] "i"(offsetof(nn_conv, channels_out))
#define NN_LIMIT4(a, b, c, d) NN_LIMIT(a) NN_LIMIT(b) NN_LIMIT(c) NN_LIMIT(d)
#define NN_FMA4(a, b, c, d, x, u, v, w, z)                                                          \
  "vfma.f32 " a ", " x ", " u "\n\tvfma.f32 " b ", " x ", " v "\n\t"                                \
  "vfma.f32 " c ", " x ", " w "\n\tvfma.f32 " d ", " x ", " z "\n\t"
#define NN_FMA4V(a, b, c, d, u, v, w, z)                                                            \
  "vfma.f32 s0, " a ", " u "\n\tvfma.f32 s1, " b ", " v "\n\t"                                      \
  "vfma.f32 s2, " c ", " w "\n\tvfma.f32 s3, " d ", " z "\n\t"
#define NN_SUMS "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "s12", "s13", "s14", "s15"
#define NN_REST                                                                                     \
  "s16", "s17", "s18", "s19", "s20", "s21", "s22", "s23", "s24", "s25", "s26", "s27", "s28", "s29", "s30", "s31"

/* Two inputs of four pixels, with the weights of four channels: s0 to s15 are sums, channel by channel.
 * 37 instructions, 32 multiply-adds. */
#define NN_DOT_4X4                                                   \
  "vldmia %[w]!, {s24-s31}\n\t"                                      \
  "vldmia %[x0]!, {s16-s17}\n\t"                                     \
  "vldmia %[x1]!, {s18-s19}\n\t"                                     \
  "vldmia %[x2]!, {s20-s21}\n\t"                                     \
  "vldmia %[x3]!, {s22-s23}\n\t"                                     \
  NN_FMA4("s0", "s1", "s2", "s3", "s16", "s24", "s25", "s26", "s27") \
  NN_FMA4("s4", "s5", "s6", "s7", "s18", "s24", "s25", "s26", "s27") \
  NN_FMA4("s8", "s9", "s10", "s11", "s20", "s24", "s25", "s26", "s27") \
  NN_FMA4("s12", "s13", "s14", "s15", "s22", "s24", "s25", "s26", "s27") \
  NN_FMA4("s0", "s1", "s2", "s3", "s17", "s28", "s29", "s30", "s31") \
  NN_FMA4("s4", "s5", "s6", "s7", "s19", "s28", "s29", "s30", "s31") \
  NN_FMA4("s8", "s9", "s10", "s11", "s21", "s28", "s29", "s30", "s31") \
  NN_FMA4("s12", "s13", "s14", "s15", "s23", "s28", "s29", "s30", "s31")

/* Three taps side by side, `step` bytes apart, of four channels: s0 to s3 are sums. 18 instructions, 12 multiply-adds. */
#define NN_TAPS(row)                                                                                \
  "vldm " row ", {s4-s7}\n\tadd " row ", %[step]\n\t"                                              \
  "vldm " row ", {s8-s11}\n\tadd " row ", %[step]\n\t"                                             \
  "vldm " row ", {s12-s15}\n\tvldmia %[w]!, {s16-s27}\n\t"                                         \
  NN_FMA4V("s4", "s5", "s6", "s7", "s16", "s17", "s18", "s19")                                      \
  NN_FMA4V("s8", "s9", "s10", "s11", "s20", "s21", "s22", "s23")                                    \
  NN_FMA4V("s12", "s13", "s14", "s15", "s24", "s25", "s26", "s27")
#endif

#if NN_MVE
NN_INLINE float32x4_t nn_limit4(float32x4_t values, const float *limits) {
  return vminnmq_f32(vmaxnmq_f32(values, vdupq_n_f32(limits[0])), vdupq_n_f32(limits[1]));
}
#endif

#if NN_MVE || NN_FPU
/* Channels n to n + 3 of the four pixels at x. */
NN_INLINE void nn_dot_4x4(const nn_conv *c, const float *x, float *out, int32_t n) {
  const float *w = c->weights + n * c->depth, *const bias = c->bias + n;
  const float *x1 = x + c->depth, *x2 = x1 + c->depth, *x3 = x2 + c->depth;
  out += n;
#if NN_MVE
  const int32_t channels = c->channels_out;
  float32x4_t s0 = vldrwq_f32(bias), s1 = s0, s2 = s0, s3 = s0, u_, v_;
  int32_t a_, b_, c_, d_;
  /* Two inputs a turn: 15 instructions, 32 multiply-adds. */
  __asm__("dls lr, %[turns]\n"
          "1:\n\t"
          "vldrw.u32 %q[u], [%[w]], #16\n\t"
          "vldrw.u32 %q[v], [%[w]], #16\n\t"
          "ldrd %[a], %[b], [%[x0]], #8\n\t"
          "ldrd %[c], %[d], [%[x1]], #8\n\t"
          "vfma.f32 %q[s0], %q[u], %[a]\n\t"
          "vfma.f32 %q[s1], %q[u], %[c]\n\t"
          "vfma.f32 %q[s0], %q[v], %[b]\n\t"
          "vfma.f32 %q[s1], %q[v], %[d]\n\t"
          "ldrd %[a], %[b], [%[x2]], #8\n\t"
          "ldrd %[c], %[d], [%[x3]], #8\n\t"
          "vfma.f32 %q[s2], %q[u], %[a]\n\t"
          "vfma.f32 %q[s3], %q[u], %[c]\n\t"
          "vfma.f32 %q[s2], %q[v], %[b]\n\t"
          "vfma.f32 %q[s3], %q[v], %[d]\n\t"
          "le lr, 1b"
          : [x0] "+r"(x), [x1] "+r"(x1), [x2] "+r"(x2), [x3] "+r"(x3), [w] "+r"(w), [s0] "+w"(s0), [s1] "+w"(s1),
            [s2] "+w"(s2), [s3] "+w"(s3), [a] "=&r"(a_), [b] "=&r"(b_), [c] "=&r"(c_), [d] "=&r"(d_), [u] "=&w"(u_),
            [v] "=&w"(v_)
          : [turns] "r"(c->depth / 2)
          : "lr", "memory");
  vstrwq_f32(out, nn_limit4(s0, c->limits));
  vstrwq_f32(out + channels, nn_limit4(s1, c->limits));
  vstrwq_f32(out + 2 * channels, nn_limit4(s2, c->limits));
  vstrwq_f32(out + 3 * channels, nn_limit4(s3, c->limits));
#else
  int32_t rest = c->depth;
  __asm__ volatile(
      "vldm %[bias], {s0-s3}\n\t"
      "vldm %[bias], {s4-s7}\n\t"
      "vldm %[bias], {s8-s11}\n\t"
      "vldm %[bias], {s12-s15}\n"
      "1:\n\t" NN_DOT_4X4 NN_DOT_4X4
      "subs %[rest], #4\n\t"
      "bne 1b\n\t"
      NN_IF_LIMITED("%[rest]")
      NN_LIMIT4("s0", "s1", "s2", "s3") NN_LIMIT4("s4", "s5", "s6", "s7")
      NN_LIMIT4("s8", "s9", "s10", "s11") NN_LIMIT4("s12", "s13", "s14", "s15")
      "2:\n\t"
      "ldrsh %[rest], [%[c], %[channels]]\n\t"
      "vstm %[out], {s0-s3}\n\t"
      "add %[out], %[out], %[rest], lsl #2\n\t"
      "vstm %[out], {s4-s7}\n\t"
      "add %[out], %[out], %[rest], lsl #2\n\t"
      "vstm %[out], {s8-s11}\n\t"
      "add %[out], %[out], %[rest], lsl #2\n\t"
      "vstm %[out], {s12-s15}"
      : [x0] "+r"(x), [x1] "+r"(x1), [x2] "+r"(x2), [x3] "+r"(x3), [w] "+r"(w), [rest] "+r"(rest), [out] "+r"(out)
      : [bias] "r"(bias), NN_OF(c)
      : NN_SUMS, NN_REST, "cc", "memory");
#endif
}

/* Channels n to n + 3 of the pixel at x. */
NN_INLINE void nn_dot_1x4(const nn_conv *c, const float *x, float *out, int32_t n) {
  const float *w = c->weights + n * c->depth, *const bias = c->bias + n;
  out += n;
#if NN_MVE
  float32x4_t sums = vldrwq_f32(bias);
  for (int32_t k = 0; k < c->depth; k += 2, w += 8)
    sums = vfmaq_n_f32(vfmaq_n_f32(sums, vldrwq_f32(w), x[k]), vldrwq_f32(w + 4), x[k + 1]);
  vstrwq_f32(out, nn_limit4(sums, c->limits));
#else
  int32_t rest = c->depth;
  __asm__ volatile(
      "vldm %[bias], {s0-s3}\n"
      "1:\n\t"
      "vldmia %[x]!, {s4-s7}\n\t"
      "vldmia %[w]!, {s16-s31}\n\t"
      NN_FMA4("s0", "s1", "s2", "s3", "s4", "s16", "s17", "s18", "s19")
      NN_FMA4("s0", "s1", "s2", "s3", "s5", "s20", "s21", "s22", "s23")
      NN_FMA4("s0", "s1", "s2", "s3", "s6", "s24", "s25", "s26", "s27")
      NN_FMA4("s0", "s1", "s2", "s3", "s7", "s28", "s29", "s30", "s31")
      "subs %[rest], #4\n\t"
      "bne 1b\n\t"
      NN_IF_LIMITED("%[rest]")
      NN_LIMIT4("s0", "s1", "s2", "s3")
      "2:\n\t"
      "vstm %[out], {s0-s3}"
      : [x] "+r"(x), [w] "+r"(w), [rest] "+r"(rest)
      : [bias] "r"(bias), [out] "r"(out), NN_OF(c)
      : NN_SUMS, NN_REST, "cc", "memory");
#endif
}
#endif

/* Dot products: `pixels` vectors of `depth` values at x, each with every channel's weights; depth % 4 == 0. */
NN_KERNEL void nn_dot(const nn_conv *c, const float *x, float *out, int32_t pixels, float *patch) {
  (void)patch;
  const int32_t channels = c->channels_out;
  while (pixels > 0) {
    const int32_t count = pixels < 4 ? 1 : 4;
    int32_t n = 0;
#if NN_MVE || NN_FPU
    if (count == 4)
      for (; n + 4 <= channels; n += 4) nn_dot_4x4(c, x, out, n);
    else
      for (; n + 4 <= channels; n += 4) nn_dot_1x4(c, x, out, n);
#endif
    for (; n < channels; n++)
      for (int32_t p = 0; p < count; p++) out[p * channels + n] = nn_dot_one(c, x + p * c->depth, n);
    x += count * c->depth;
    out += count * channels;
    pixels -= count;
  }
}

/* Channel n's output at column x of the padded rows. */
NN_INLINE float nn_depthwise_one(const nn_conv *c, const float *const *rows, int32_t x, int32_t n) {
  const float *w = c->weights + n / 4 * 4 * c->depth + n % 4;
  float sum = c->bias[n];
  for (int32_t ky = 0; ky < c->kernel_h; ky++)
    for (int32_t kx = 0; kx < c->kernel_w; kx++, w += 4) sum = nn_fma(rows[ky][(x + kx) * c->channels_in + n], *w, sum);
  return nn_limit(sum, c->limits);
}

/* One row of a depthwise convolution; `rows` begin at the left padding. */
NN_KERNEL void nn_depthwise(const nn_conv *c, const float *const *rows, float *out) {
  const int32_t channels = c->channels_in;
#if NN_MVE || NN_FPU
  const int fast = c->kernel_h == 3 && c->kernel_w == 3;
#endif
  for (int32_t x = 0; x < c->width_out; x++) {
    int32_t n = 0;
#if NN_MVE || NN_FPU
    const float *w = c->weights, *bias = c->bias;
    const int32_t at = x * c->stride_w * channels;
    for (; fast && n + 4 <= channels; n += 4, bias += 4, out += 4) {
      const float *r0 = rows[0] + at + n, *r1 = rows[1] + at + n, *r2 = rows[2] + at + n;
#if NN_MVE
      float32x4_t sums = vldrwq_f32(bias);
      for (int32_t k = 0; k < 3; k++, r0 += channels, w += 4) sums = vfmaq_f32(sums, vldrwq_f32(r0), vldrwq_f32(w));
      for (int32_t k = 0; k < 3; k++, r1 += channels, w += 4) sums = vfmaq_f32(sums, vldrwq_f32(r1), vldrwq_f32(w));
      for (int32_t k = 0; k < 3; k++, r2 += channels, w += 4) sums = vfmaq_f32(sums, vldrwq_f32(r2), vldrwq_f32(w));
      vstrwq_f32(out, nn_limit4(sums, c->limits));
#else
      __asm__ volatile(
          "vldm %[bias], {s0-s3}\n\t"
          NN_TAPS("%[r0]") NN_TAPS("%[r1]") NN_TAPS("%[r2]")
          NN_IF_LIMITED("%[r0]")
          NN_LIMIT4("s0", "s1", "s2", "s3")
          "2:\n\t"
          "vstm %[out], {s0-s3}"
          : [r0] "+r"(r0), [r1] "+r"(r1), [r2] "+r"(r2), [w] "+r"(w)
          : [bias] "r"(bias), [step] "r"(4 * channels), [out] "r"(out), NN_OF(c)
          : NN_SUMS, NN_REST, "cc", "memory");
#endif
    }
#endif
    for (; n < channels; n++) *out++ = nn_depthwise_one(c, rows, x * c->stride_w, n);
  }
}

/* out may be a: element by element. */
NN_KERNEL void nn_add_run(const nn_add *d, const float *a, const float *b, float *out, int32_t count) {
  for (int32_t i = 0; i < count; i++) out[i] = nn_limit(a[i] + b[i], d->limits);
}

/* The mean over height and width. */
NN_KERNEL void nn_average(const nn_conv *c, const float *x, float *out) {
  const int32_t channels = c->channels_in, pixels = c->height_in * c->width_in;
  for (int32_t n = 0; n < channels; n++) {
    float sum = 0;
    for (int32_t p = 0; p < pixels; p++) sum += x[p * channels + n];
    out[n] = sum / (float)pixels;
  }
}

#endif
