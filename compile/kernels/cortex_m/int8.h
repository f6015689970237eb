// Longer than 450 lines: a generated project has all of its int8 kernels in one header. Projects get no
// line that begins with //; without an FPU they get portable.h's parts of the names after //.
/* int8 kernels, NHWC. The same integers come out on every CPU, and they are ONNX Runtime's: sums are exact, and
 *
 *   output = saturate(zero + rint((float)sum * ratio)),  rounded to float32 twice, then to even at a half.
 *
 * Without an FPU the compiler's own routines do that, slowly.
 */
#ifndef NN_INT8_H
#define NN_INT8_H

/* How the generator laid out the weights, see nn_weight and nn_tap:
 * 1, for SMLAD: convolutions in words of four weights, two channels in turn. Weights 0 and 1 of a word are the
 *    int16 w1 * 256 + w0, weights 2 and 3 likewise, and all sums are 256 times as large: see nn_even. Where that
 *    would overflow, the convolution is `wide`: its words have a byte for each weight. Words never hold
 *    weights of two kernel rows; what is left of the rows follows them.
 *    Depthwise ones of 3x3: see nn_depthwise; others: for every channel every tap.
 * 2, for MVE: convolutions in vectors of sixteen weights, four channels in turn; depthwise ones for every
 *    eight channels and every tap. */
#ifndef NN_LAYOUT
#define NN_LAYOUT 1
#endif
/* Whether a convolution is wide. */
#ifndef NN_WIDE
#define NN_WIDE 1
#endif
#define NN_IS_WIDE(c) (NN_WIDE && (c)->wide)

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

/* Whether inputs are widened into a patch, of how many pixels, of how many at most, and the bytes of such a patch. */
#define NN_WIDENS NN_DSP
#define NN_PIXELS(c) ((c)->pixels)
#define NN_MOST 4
#define NN_PATCH(c) (2 * NN_MOST * (c)->depth)
#if NN_DSP && defined(__ARM_FP)
#define NN_FPU 1
#else
#define NN_FPU 0
#endif

typedef int8_t nn_value;
/* Outputs of a convolution that nn_dot computes together. */
enum { NN_TOGETHER = NN_LAYOUT == 1 ? 1 : 2 };

/* What a sum of an output channel begins with, and input scale * weight scale / output scale. With sums that are 256
 * times as large, the ratio is divided by 256, and the bias takes off what nn_even adds. */
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
  int8_t pixels, wide; /* layout 1: for how many pixels there is scratch, 1, 2 or 4; see NN_LAYOUT */
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

// requantise
NN_INLINE int8_t nn_requantise(int32_t sum, float ratio, int32_t zero) {
  return nn_saturate(nn_round((float)sum * ratio) + zero);
}
// end

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

#if NN_LAYOUT == 1
/* Channel n's output for the pixel at x, the rows of the kernel one after the other. */
NN_INLINE int8_t nn_dot_one(const nn_conv *c, const int8_t *x, int32_t n) {
  const int32_t row = c->kernel_w * c->channels_in, whole = row / 4 * 4;
  const int8_t *w = c->weights + n / 2 * 2 * c->depth + n % 2 * 4;
  const int8_t *rest = w + whole * c->kernel_h * 2;
  int32_t sum = 0, even = 0, left = 0;
  for (int32_t y = 0; y < c->kernel_h; y++, x += row) {
    for (int32_t k = 0; k < whole; k += 4, w += 8) {
      const int32_t carry = NN_IS_WIDE(c) ? 0 : 1;
      const int32_t w0 = w[0], w1 = w[1] + (w0 < 0 ? carry : 0), w2 = w[2], w3 = w[3] + (w2 < 0 ? carry : 0);
      sum += x[k] * w0 + x[k + 1] * w1 + x[k + 2] * w2 + x[k + 3] * w3;
      even += w0 + w2;
    }
    for (int32_t k = whole; k < row; k++, left++) {
      const int8_t *const at = rest + left / 4 * 8;
      const int32_t i = left % 4;
      if (i % 2 == 0) even += at[i];
      sum += x[k] * (at[i] + (i % 2 && !NN_IS_WIDE(c) && at[i - 1] < 0));
    }
  }
  if (!NN_IS_WIDE(c)) sum = sum * 256 + even * 127;
  return nn_requantise(sum + c->scales[n].bias, c->scales[n].ratio, c->zero_out);
}
#else
/* Channel n's weight k of a convolution. */
NN_INLINE int32_t nn_weight(const nn_conv *c, int32_t n, int32_t k) {
  return c->weights[((n / 4 * ((c->depth + 15) / 16) + k / 16) * 4 + n % 4) * 16 + k % 16];
}

/* Channel n's output for the pixel at x. */
NN_INLINE int8_t nn_dot_one(const nn_conv *c, const int8_t *x, int32_t n) {
  int32_t sum = c->scales[n].bias;
  for (int32_t k = 0; k < c->depth; k++) sum += x[k] * nn_weight(c, n, k);
  return nn_requantise(sum, c->scales[n].ratio, c->zero_out);
}
#endif

#if NN_DSP
/* Of four inputs, numbers 1 and 3. */
NN_INLINE int32_t nn_odd(int32_t word) {
  int32_t halves;
  __asm__("sxtb16 %0, %1, ror #8" : "=r"(halves) : "r"(word));
  return halves;
}

/* What meets weights 0 and 2: x0 * 256 - x1 + 127 and the same of 2 and 3. Then four products take two SMLADs and one
 * SXTB16, as (w1 * 256 + w0) * x1 + w0 * (x0 * 256 - x1 + 127) = (w0 * x0 + w1 * x1) * 256 + w0 * 127. */
NN_INLINE int32_t nn_even(int32_t word) {
  int32_t halves;
  __asm__("rev16 %0, %1" : "=r"(halves) : "r"(word));
  return halves ^ 0x007F007F;
}

NN_INLINE int32_t nn_even_wide(int32_t word) {
  int32_t halves;
  __asm__("sxtb16 %0, %1" : "=r"(halves) : "r"(word));
  return halves;
}

NN_INLINE int32_t nn_load(const int8_t *from) {
  int32_t word;
  memcpy(&word, from, 4);
  return word;
}

/* One pixel of `few`: for each four inputs numbers 1 and 3 of all pixels, then 0 and 2. A single pixel stays as it is. */
NN_INLINE int32_t *nn_widen_word(const nn_conv *c, int32_t *to, int32_t word, int32_t few) {
  if (few == 1) {
    *to = word;
    return to + 1;
  }
  to[0] = nn_odd(word);
  to[few] = NN_IS_WIDE(c) ? nn_even_wide(word) : nn_even(word);
  return to + 2 * few;
}

NN_INLINE int32_t *nn_widen(const nn_conv *c, int32_t *to, const int8_t *from, int32_t words, int32_t few) {
  for (const int8_t *const end = from + 4 * words; from != end; from += 4) to = nn_widen_word(c, to, nn_load(from), few);
  return to;
}

/* What an output looks at, all of it inside the image; a kernel row has four bytes at least. */
NN_INLINE void nn_prepare_inside(const nn_conv *c, const int8_t *from, int32_t *to, uint32_t row, int32_t line, int32_t few) {
  const uint32_t bits = row % 4 * 8;
  const int8_t *const whole = from + row / 4 * 4;
  int32_t *rest = to + (uint32_t)c->kernel_h * (row / 4) * (few == 1 ? 1u : 2u * (uint32_t)few);
  uint32_t left = 0, filled = 0;
  for (int32_t down = 0, end = c->kernel_h * line; down != end; down += line) {
    for (const int8_t *x = from + down; x != whole + down; x += 4) to = nn_widen_word(c, to, nn_load(x), few);
    if (bits == 0) continue;
    const uint32_t last = (uint32_t)nn_load(from + down + row - 4) >> (32 - bits);
    left |= last << filled;
    filled += bits;
    if (filled < 32) continue;
    rest = nn_widen_word(c, rest, (int32_t)left, few);
    filled -= 32;
    left = filled ? last >> (bits - filled) : 0;
  }
  if (filled) nn_widen_word(c, rest, (int32_t)left, few);
}

/* The same near the image's borders. */
NN_KERNEL void nn_prepare_border(const nn_conv *c, const int8_t *image, int32_t *to, int32_t few, int32_t y, int32_t x) {
  const int32_t row = c->kernel_w * c->channels_in, whole = row / 4 * 4, line = c->width_in * c->channels_in;
  const int32_t before = x < 0 ? -x * c->channels_in : 0;
  const int32_t after = x + c->kernel_w > c->width_in ? (x + c->kernel_w - c->width_in) * c->channels_in : 0;
  const int32_t zeros = (int32_t)((uint32_t)(uint8_t)c->zero_in * 0x01010101u);
  int32_t *rest = to + c->kernel_h * (whole / 4) * (few == 1 ? 1 : 2 * few);
  uint32_t left = 0, shift = 0;
  int32_t at = y * line + x * c->channels_in;
  for (int32_t ky = y; ky < y + c->kernel_h; ky++, at += line) {
    const int inside = ky >= 0 && ky < c->height_in;
    const int32_t begin = inside ? before : row, end = inside ? row - after : row;
    for (int32_t k = 0; k < whole; k += 4) {
      int32_t word = zeros;
      if (k >= begin && k + 4 <= end)
        word = nn_load(image + at + k);
      else
        for (int32_t i = k < begin ? begin : k; i < k + 4 && i < end; i++) memcpy((int8_t *)&word + i - k, image + at + i, 1);
      to = nn_widen_word(c, to, word, few);
    }
    for (int32_t k = whole; k < row; k++) {
      left |= (uint32_t)(uint8_t)(k >= begin && k < end ? image[at + k] : c->zero_in) << shift;
      shift += 8;
      if (shift < 32) continue;
      rest = nn_widen_word(c, rest, (int32_t)left, few);
      left = shift = 0;
    }
  }
  if (shift) nn_widen_word(c, rest, (int32_t)left, few);
}

/* What the outputs at (y, x) of the input and right of it look at, widened. */
NN_KERNEL void nn_prepare(const nn_conv *c, const int8_t *image, int32_t *to, int32_t few, int32_t y, int32_t x) {
  const int32_t channels = c->channels_in, line = c->width_in * channels, step = c->stride_w;
  const uint32_t row = (uint32_t)(c->kernel_w * channels);
  /* No pixel is inside that begins right of this. */
  const int32_t most = y >= 0 && y + c->kernel_h <= c->height_in && row >= 4 ? c->width_in - c->kernel_w : -1;
  int32_t *const end = to + few;
  for (; to != end; x += step, to++) {
    const int8_t *const from = image + y * line + x * channels;
    if (x < 0 || x > most)
      nn_prepare_border(c, image, to, few, y, x);
    else if (few == 4)
      nn_prepare_inside(c, from, to, row, line, 4);
    else if (few == 2)
      nn_prepare_inside(c, from, to, row, line, 2);
    else
      nn_prepare_inside(c, from, to, row, line, 1);
  }
}

/* What nn_tiles hands to its assembler. */
typedef struct {
  const int32_t *x, *end; /* widened inputs */
  uintptr_t skip;         /* bytes of the code of the words that the first turn leaves out */
  int8_t *out;
  int32_t channels, left;
  const nn_scale *scales;
  int32_t odd; /* the zero point's last bit: it comes after the rounding, which is to even */
  int32_t pair; /* bytes of the weights of two channels */
  float magic;
  const int8_t *weights;
#if !NN_FPU
  int32_t sums[8];
#endif
} nn_tile;

#define NN_MADS(sum0, sum1, inputs) \
  "smlad " sum0 ", " inputs ", r4, " sum0 "\n\tsmlad " sum1 ", " inputs ", r5, " sum1 "\n\t"
#define NN_WEIGHTS "ldmia r1!, {r4, r5}\n\t"
#define NN_EVENS "sxtb16 r4, r4\n\tsxtb16 r5, r5\n\t"
#define NN_WEIGHTS_WIDE "ldm.w r1, {r4, r5}\n\tsxtb16 r4, r4, ror #8\n\tsxtb16 r5, r5, ror #8\n\t"
#define NN_EVENS_WIDE NN_WEIGHTS NN_EVENS
/* Four products of two and four pixels and two channels; what is wide takes 12 bytes more of code. */
#define NN_WORD2(weights, evens)                                                            \
  weights "ldmia r0!, {r2, r3, r6, r7}\n\t" NN_MADS("r8", "r9", "r2") NN_MADS("r10", "r11", "r3") evens \
      NN_MADS("r8", "r9", "r6") NN_MADS("r10", "r11", "r7")
#define NN_WORD4(weights, evens)                                                                       \
  weights "ldmia r0!, {r2, r3}\n\t" NN_MADS("r6", "r7", "r2") NN_MADS("r8", "r9", "r3")                \
  "ldmia r0!, {r2, r3}\n\t" NN_MADS("r10", "r11", "r2") NN_MADS("r12", "lr", "r3") evens               \
  "ldmia r0!, {r2, r3}\n\t" NN_MADS("r6", "r7", "r2") NN_MADS("r8", "r9", "r3")                        \
  "ldmia r0!, {r2, r3}\n\t" NN_MADS("r10", "r11", "r2") NN_MADS("r12", "lr", "r3")
/* Of one pixel, which is not widened, and four channels. */
#define NN_MADS4(inputs)                                                                          \
  NN_MADS("r8", "r9", inputs) "smlad r10, " inputs ", r6, r10\n\tsmlad r11, " inputs ", r7, r11\n\t"
#define NN_EVENS4 NN_EVENS "sxtb16 r6, r6\n\tsxtb16 r7, r7\n\t"
#define NN_WORD1(weights, evens)                                                                  \
  "ldr r2, [r0], #4\n\tldmia r1!, {r4, r5}\n\tldm.w r12!, {r6, r7}\n\tsxtb16 r3, r2, ror #8\n\t" weights evens
#define NN_ODDS1 NN_MADS4("r3")
#define NN_EVENS1 "rev16 r2, r2\n\teor r2, r2, #0x007F007F\n\t" NN_EVENS4 NN_MADS4("r2")
#define NN_MAD_WIDE(sum, weight) "sxtb16 lr, " weight ", ror #8\n\tsmlad " sum ", r3, lr, " sum "\n\t"
#define NN_ODDS1_WIDE NN_MAD_WIDE("r8", "r4") NN_MAD_WIDE("r9", "r5") NN_MAD_WIDE("r10", "r6") NN_MAD_WIDE("r11", "r7")
#define NN_EVENS1_WIDE "sxtb16 r2, r2\n\t" NN_EVENS4 NN_MADS4("r2")
enum { NN_WORD1_BYTES = 68, NN_WORD2_BYTES = 44, NN_WORD4_BYTES = 82, NN_WIDE_BYTES = 12, NN_WIDE1_BYTES = 14 };

/* The second two channels may not be there: then those of the first are computed again. */
#define NN_BIASES1                                                                                         \
  "ldr r3, [sp, #20]\n\tldr r12, [sp, #32]\n\tadd.w r4, r2, #16\n\tcmp r3, #2\n\titt le\n\t"                \
  "movle r12, #0\n\tmovle r4, r2\n\tadd r12, r1\n\tldr r8, [r2]\n\tldr r9, [r2, #8]\n\t"                    \
  "ldr r10, [r4]\n\tldr r11, [r4, #8]\n\t" NN_RATIOS1
#define NN_BIASES2 "ldr r8, [r2]\n\tldr r9, [r2, #8]\n\tmov r10, r8\n\tmov r11, r9\n\t"
#define NN_BIASES4                                                                                 \
  "ldr r6, [r2]\n\tldr r7, [r2, #8]\n\tmov r8, r6\n\tmov r9, r7\n\tmov r10, r6\n\tmov r11, r7\n\tmov r12, r6\n\tmov lr, r7\n\t"

#if NN_FPU
#define NN_RATIOS1 "vldr s4, [r2, #4]\n\tvldr s5, [r2, #12]\n\tvldr s6, [r4, #4]\n\tvldr s7, [r4, #12]\n\t"
#define NN_CONVERT_(s, ratio) "vcvt.f32.s32 " s ", " s "\n\t"
#define NN_SCALE_(s, ratio) "vmul.f32 " s ", " s ", " ratio "\n\t"
#define NN_ROUND_(s, ratio) "vadd.f32 " s ", " s ", s10\n\t"
#define NN_ODD_(s, ratio) "vadd.f32 " s ", " s ", s11\n\t"
#define NN_INTEGER_(s, ratio) "vcvtr.s32.f32 " s ", " s "\n\t"
#define NN_PAIR_(do_, a, b) do_(a, "s8") do_(b, "s9")
#define NN_EACH1(do_) do_("s0", "s4") do_("s1", "s5") do_("s2", "s6") do_("s3", "s7")
#define NN_EACH2(do_) NN_PAIR_(do_, "s0", "s1") NN_PAIR_(do_, "s2", "s3")
#define NN_EACH4(do_) NN_EACH2(do_) NN_PAIR_(do_, "s4", "s5") NN_PAIR_(do_, "s6", "s7")
#define NN_IN1 NN_IN2
#define NN_IN2 "vmov s0, s1, r8, r9\n\tvmov s2, s3, r10, r11\n\t"
#define NN_IN4 "vmov s0, s1, r6, r7\n\tvmov s2, s3, r8, r9\n\tvmov s4, s5, r10, r11\n\tvmov s6, s7, r12, lr\n\t"
#define NN_OUT1 NN_OUT2
#define NN_OUT2 "vmov r8, r9, s0, s1\n\tvmov r10, r11, s2, s3\n\t"
#define NN_OUT4 "vmov r6, r7, s0, s1\n\tvmov r8, r9, s2, s3\n\tvmov r10, r11, s4, s5\n\tvmov r12, lr, s6, s7\n\t"
#define NN_SUMS1(do_) NN_SUMS2(do_)
#define NN_SUMS2(do_) do_("r8") do_("r9") do_("r10") do_("r11")
#define NN_SUMS4(do_) do_("r6") do_("r7") NN_SUMS2(do_) do_("r12") do_("lr")
#define NN_LOW_(r) "ssat16 " r ", #8, " r "\n\t"
#define NN_WHOLE_(r) "add " r ", " r ", r3\n\tssat " r ", #8, " r "\n\t"
/* Sums of narrow numbers, and 1.5 * 2^23 (s10): the float's lowest 16 bits are the rounded number. */
#define NN_FINISH(few)                                                                             \
  NN_EACH##few(NN_ROUND_) "cbz r3, 3f\n\t" NN_EACH##few(NN_ODD_) "3:\n\t" NN_OUT##few NN_SUMS##few(NN_LOW_)
#define NN_FINISH_WIDE(few) NN_EACH##few(NN_INTEGER_) NN_OUT##few NN_SUMS##few(NN_WHOLE_)
#define NN_FIRST2 "add r0, r2, r3\n\tstrb r8, [r2]\n\tstrb r10, [r0]\n\t"
#define NN_SECOND2 "strb r9, [r2, #1]\n\tstrb r11, [r0, #1]\n\t"
#define NN_FIRST4                                                                     \
  "add r0, r2, r3\n\tadd r5, r0, r3\n\tadd r3, r5\n\t"                                \
  "strb r6, [r2]\n\tstrb r8, [r0]\n\tstrb r10, [r5]\n\tstrb r12, [r3]\n\t"
#define NN_SECOND4 "strb r7, [r2, #1]\n\tstrb r9, [r0, #1]\n\tstrb r11, [r5, #1]\n\tstrb lr, [r3, #1]\n\t"
#define NN_REQUANTISE(few, finish)                                                                          \
  "ldr r2, [sp, #24]\n\tvldr s8, [r2, #4]\n\tvldr s9, [r2, #12]\n\tadds r2, #16\n\tstr r2, [sp, #24]\n\t"   \
  "ldr r3, [sp, #28]\n\t" NN_IN##few NN_EACH##few(NN_CONVERT_) NN_EACH##few(NN_SCALE_) finish(few)          \
  "ldrd r2, r3, [sp, #12]\n\tldr r4, [sp, #20]\n\tadds r5, r2, #2\n\tstr r5, [sp, #12]\n\t" NN_FIRST##few   \
  "subs r4, #2\n\tbmi 4f\n\t" NN_SECOND##few "str r4, [sp, #20]\n\tbne 1b\n4:\n\t"
#define NN_REQUANTISE1(finish)                                                                            \
  "mov r1, r12\n\tldr r2, [sp, #24]\n\tadds r2, #32\n\tstr r2, [sp, #24]\n\tldr r3, [sp, #28]\n\t"        \
  NN_IN1 NN_EACH1(NN_CONVERT_) NN_EACH1(NN_SCALE_) finish(1)                                              \
  "ldr r2, [sp, #12]\n\tldr r4, [sp, #20]\n\tadds r5, r2, #4\n\tstr r5, [sp, #12]\n\tstrb r8, [r2]\n\t"   \
  "cmp r4, #2\n\tblt 4f\n\tstrb r9, [r2, #1]\n\tbeq 4f\n\tstrb r10, [r2, #2]\n\tsubs r4, #4\n\tbmi 4f\n\t" \
  "strb r11, [r2, #3]\n\tstr r4, [sp, #20]\n\tbne 1b\n4:\n\t"
#define NN_MAGIC "vldr s10, [r0, #36]\n\tvmov.f32 s11, #1.0\n\t"
#else
#define NN_MAGIC ""
#define NN_RATIOS1 ""
#define NN_FINISH 0
#define NN_FINISH_WIDE 0
#define NN_LIST2 "{r8-r11}"
#define NN_LIST4 "{r6-r12, lr}"
#define NN_REQUANTISE(few, finish) "ldr r2, [sp, #36]\n\tadds r2, #44\n\tstm r2, " NN_LIST##few "\n\t"
#define NN_REQUANTISE1(finish) NN_REQUANTISE(2, finish)
#endif

/* Every two channels, of one pixel every four; without an FPU only the first, whose sums it stores. */
#define NN_TILE(word, biases, requantise)                                                                \
  "push {r0, r4-r11, lr}\n\t" NN_MAGIC "ldr r1, [r0, #40]\n\tldm r0, {r2-r10}\n\t"                       \
  "adr.w r11, 2f\n\tadd r4, r11\n\tpush {r2-r10}\n"                                                      \
  "1:\tldr r2, [sp, #24]\n\t" biases "ldr r0, [sp]\n\tldr r3, [sp, #8]\n\tmov pc, r3\n\t"                \
  ".balign 4\n"                                                                                          \
  "2:\t" word word word word "ldr r2, [sp, #4]\n\tcmp r0, r2\n\tbne 2b\n\t" requantise                   \
  "add sp, #36\n\tpop {r0, r4-r11, lr}"
#define NN_RUN_TILE(text)                                                                                      \
  __asm__ volatile(text : "+r"(tile) : : "r1", "r2", "r3", "r12", "cc", "memory" NN_FLOAT_REGISTERS)
#if NN_FPU
#define NN_FLOAT_REGISTERS , "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11"
#else
#define NN_FLOAT_REGISTERS
#endif

NN_INLINE void nn_tile_run(const nn_tile *arguments, int32_t few, int wide) {
  register const nn_tile *tile __asm__("r0") = arguments;
#define NN_TILES(few, weights, evens, finish) \
  NN_RUN_TILE(NN_TILE(NN_WORD##few(weights, evens), NN_BIASES##few, NN_REQUANTISE(few, finish)))
#define NN_TILES1(weights, evens, finish) \
  NN_RUN_TILE(NN_TILE(NN_WORD1(weights, evens), NN_BIASES1, NN_REQUANTISE1(finish)))
  if (wide) {
    if (few == 4) NN_TILES(4, NN_WEIGHTS_WIDE, NN_EVENS_WIDE, NN_FINISH_WIDE);
    else if (few == 2) NN_TILES(2, NN_WEIGHTS_WIDE, NN_EVENS_WIDE, NN_FINISH_WIDE);
    else NN_TILES1(NN_ODDS1_WIDE, NN_EVENS1_WIDE, NN_FINISH_WIDE);
  } else {
    if (few == 4) NN_TILES(4, NN_WEIGHTS, NN_EVENS, NN_FINISH);
    else if (few == 2) NN_TILES(2, NN_WEIGHTS, NN_EVENS, NN_FINISH);
    else NN_TILES1(NN_ODDS1, NN_EVENS1, NN_FINISH);
  }
}

/* Every channel of `few` pixels: 1, 2 or 4. */
NN_KERNEL void nn_tiles(const nn_conv *c, const int32_t *words, int8_t *out, int32_t few) {
  const int wide = NN_IS_WIDE(c);
  const int32_t count = c->depth / 4, odd = c->zero_out & 1;
  int32_t bytes = few == 4 ? NN_WORD4_BYTES : few == 2 ? NN_WORD2_BYTES : NN_WORD1_BYTES;
  if (wide) bytes += few == 1 ? NN_WIDE1_BYTES : NN_WIDE_BYTES;
  nn_tile tile = {
      .x = words, .end = words + count * (few == 1 ? 1 : 2 * few), .skip = (uintptr_t)((-count & 3) * bytes),
      .out = out, .channels = c->channels_out, .left = c->channels_out, .scales = c->scales,
      .odd = wide ? c->zero_out : odd, .pair = 2 * c->depth,
      .magic = 12582912.0f + (float)(c->zero_out - odd), .weights = c->weights,
  };
#if NN_FPU
  nn_tile_run(&tile, few, wide);
#else
  const int32_t channels = few == 1 ? 4 : 2;
  for (; tile.left > 0; tile.left -= channels, tile.scales += channels, tile.weights += channels * c->depth) {
    nn_tile_run(&tile, few, wide);
    for (int32_t p = 0; p < few; p++)
      for (int32_t n = 0; n < channels && n < tile.left; n++)
        out[p * tile.channels + tile.channels - tile.left + n] =
            nn_requantise(tile.sums[channels * p + n], tile.scales[n].ratio, c->zero_out);
  }
#endif
}

/* How many pixels nn_tiles takes of those left. */
NN_INLINE int32_t nn_few(int32_t pixels, int32_t left) {
  const int32_t most = left < pixels ? left : pixels;
  return most >= 4 ? 4 : most >= 2 ? 2 : 1;
}
#endif

/* Dot products: `pixels` vectors of `depth` bytes at x, each with every channel's weights; depth % 4 == 0. `patch` is
 * the convolution's scratch. */
NN_KERNEL void nn_dot(const nn_conv *c, const int8_t *x, int8_t *out, int32_t pixels, int8_t *patch) {
  const int32_t depth = c->depth, channels = c->channels_out;
  int8_t *const first = out;
#if NN_DSP
  int32_t *const words = (int32_t *)(void *)patch;
  for (int32_t p = 0, few; p < pixels; p += few, out += few * channels) {
    few = nn_few(c->pixels, pixels - p);
    if (few == 1) {
      nn_tiles(c, (const int32_t *)(const void *)x, out, 1);
      x += depth;
      continue;
    }
    for (int32_t i = 0; i < few; i++, x += depth) {
      if (few == 4)
        nn_widen(c, words + i, x, depth / 4, 4);
      else
        nn_widen(c, words + i, x, depth / 4, 2);
    }
    nn_tiles(c, words, out, few);
  }
#else
  (void)patch;
#endif
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
#elif !NN_DSP
  for (int32_t p = 0; p < pixels; p++, x += depth)
    for (int32_t n = 0; n < channels; n++) *out++ = nn_dot_one(c, x, n);
#endif
  nn_clamp(first, pixels * channels, c->low, c->high);
}

/* Channel n's weight at a tap of a depthwise convolution. */
NN_INLINE int32_t nn_tap(const nn_conv *c, int32_t tap, int32_t n) {
#if NN_LAYOUT == 1
  if (c->kernel_h != 3 || c->kernel_w != 3) return c->weights[n * c->depth + tap];
  int16_t weight;
  memcpy(&weight, c->weights + n * 20 + (tap < 6 ? tap % 3 * 2 + tap / 3 : tap) * 2, sizeof weight);
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

#if NN_FPU
/* What nn_depthwise hands to its assembler. */
typedef struct {
  const int8_t *rows[3]; /* their ends */
  int32_t start, step;   /* bytes from there to the first column, and between columns */
  const int8_t *weights; /* int16 of rows 0 and 1 of each column, then of row 2, then 0 */
  const nn_scale *scales;
  int32_t channels;
  int8_t *out; /* of stride 1 the row's end, of stride 2 its begin */
  float magic;
} nn_filter;

/* Rows 0 and 1 of a column in r3, row 2 in lr. */
#define NN_COLUMN                                                                              \
  "ldrsb r3, [r0, r12]\n\tldrsb lr, [r1, r12]\n\tpkhbt r3, r3, lr, lsl #16\n\tldrsb lr, [r2, r12]\n\t"
#define NN_LEFT(sum) "smlad " sum ", r3, r4, " sum "\n\tsmlabb " sum ", lr, r7, " sum "\n\t"
#define NN_MIDDLE(sum) "smlad " sum ", r3, r5, " sum "\n\tsmlabt " sum ", lr, r7, " sum "\n\t"
#define NN_RIGHT(sum) "smlad " sum ", r3, r6, " sum "\n\tsmlabb " sum ", lr, r8, " sum "\n\t"
#define NN_NEXT "adds r12, r12, r8, asr #16\n\t"
/* The next channel: its weights in r4 to r8, and the step in what r8 leaves; bias s1, ratio s2. */
#define NN_FILTER(first, turns, columns)                                                            \
  "push {r0, r4-r11, lr}\n\tvldr s3, [r0, #36]\n\tvmov.f32 s4, #1.0\n\t"                            \
  "ldm r0, {r0-r2, r4-r9}\n\tpush {r4-r9}\n"                                                        \
  "1:\tldr r3, [sp, #8]\n\tldm r3!, {r4-r8}\n\tstr r3, [sp, #8]\n\tldr r3, [sp, #12]\n\t"           \
  "vldr s1, [r3]\n\tvldr s2, [r3, #4]\n\tadds r3, #8\n\tstr r3, [sp, #12]\n\t"                      \
  "ldrd r12, r3, [sp]\n\torr r8, r8, r3, lsl #16\n\tldr r3, [sp, #20]\n\t" first                    \
  "adds r3, #1\n\tstr r3, [sp, #20]\n\t"                                                            \
  NN_COLUMN "vmov r9, s1\n\t" NN_LEFT("r9") NN_NEXT columns "2:\n\t" turns                          \
  "3:\tadds r0, #1\n\tadds r1, #1\n\tadds r2, #1\n\tldr r3, [sp, #16]\n\tsubs r3, #1\n\t"           \
  "str r3, [sp, #16]\n\tbne 1b\n\tadd sp, #24\n\tpop {r0, r4-r11, lr}"
/* A column is the right one of sum a, the middle of b, the left of c. */
#define NN_TURN1(a, b, c, odd)                                                                      \
  NN_COLUMN "vmov " c ", s1\n\t" NN_RIGHT(a) "vmov s0, " a "\n\t" NN_MIDDLE(b)                      \
  "vcvt.f32.s32 s0, s0\n\t" NN_LEFT(c) "vmul.f32 s0, s0, s2\n\tvmov lr, s5\n\t"                     \
  "vadd.f32 s0, s0, s3\n\t" odd "vmov r3, s0\n\tssat16 r3, #8, r3\n\tstrb r3, [lr, r12]\n\t" NN_NEXT
#define NN_TURNS1(odd)                                                                              \
  NN_TURN1("r9", "r10", "r11", odd) "beq 3f\n\t" NN_TURN1("r10", "r11", "r9", odd) "beq 3f\n\t"     \
  NN_TURN1("r11", "r9", "r10", odd) "bne 2b\n"
#define NN_COLUMNS1 NN_COLUMN "vmov r10, s1\n\t" NN_MIDDLE("r9") NN_LEFT("r10") NN_NEXT
/* Two columns: the middle one of sum a, then its right one, which is the left of b. */
#define NN_TURN2(a, b, odd)                                                                         \
  NN_COLUMN NN_MIDDLE(a) NN_NEXT NN_COLUMN NN_RIGHT(a) "vmov s0, " a "\n\tvmov " b ", s1\n\t"       \
  "vcvt.f32.s32 s0, s0\n\t" NN_LEFT(b) "vmul.f32 s0, s0, s2\n\t"                                    \
  "vadd.f32 s0, s0, s3\n\t" odd "vmov r3, s0\n\tssat16 r3, #8, r3\n\tstrb r3, [r11]\n\t"            \
  "add r11, r11, r8, asr #16\n\t" NN_NEXT
#define NN_TURNS2(odd) NN_TURN2("r9", "r10", odd) "beq 3f\n\t" NN_TURN2("r10", "r9", odd) "bne 2b\n"
#define NN_ODD_ZERO "vadd.f32 s0, s0, s4\n\t"
#define NN_RUN_FILTER(text)                                                                       \
  __asm__ volatile(text : "+r"(filter) : : "r1", "r2", "r3", "r12", "cc", "memory", "s0", "s1", "s2", "s3", "s4", "s5")

NN_KERNEL void nn_filter_run(const nn_filter *arguments, int32_t stride, int32_t odd) {
  register const nn_filter *filter __asm__("r0") = arguments;
  if (stride == 1 && !odd) NN_RUN_FILTER(NN_FILTER("vmov s5, r3\n\t", NN_TURNS1(""), NN_COLUMNS1));
  else if (stride == 1) NN_RUN_FILTER(NN_FILTER("vmov s5, r3\n\t", NN_TURNS1(NN_ODD_ZERO), NN_COLUMNS1));
  else if (!odd) NN_RUN_FILTER(NN_FILTER("mov r11, r3\n\t", NN_TURNS2(""), ""));
  else NN_RUN_FILTER(NN_FILTER("mov r11, r3\n\t", NN_TURNS2(NN_ODD_ZERO), ""));
}
#endif

/* One row of a depthwise convolution; `rows` begin at the left padding. */
NN_KERNEL void nn_depthwise(const nn_conv *c, const int8_t *const *rows, int8_t *out) {
  const int32_t channels = c->channels_in;
  const int32_t step = c->stride_w;
  int8_t *const first = out;
#if NN_FPU
  if (c->kernel_h == 3 && c->kernel_w == 3 && step <= 2 && !c->wide) {
    const int32_t bytes = (step * (c->width_out - 1) + 3) * channels, odd = c->zero_out & 1;
    const nn_filter filter = {
        .rows = {rows[0] + bytes, rows[1] + bytes, rows[2] + bytes}, .start = -bytes, .step = channels,
        .weights = c->weights, .scales = c->scales, .channels = channels,
        .out = out + (step == 1 ? c->width_out * channels : 0), .magic = 12582912.0f + (float)(c->zero_out - odd),
    };
    nn_filter_run(&filter, step, odd);
    nn_clamp(out, c->width_out * channels, c->low, c->high);
    return;
  }
#elif NN_LAYOUT == 1
  if (c->kernel_h == 3 && c->kernel_w == 3) {
    for (int32_t n = 0; n < channels; n++) {
      int32_t w[9];
      for (int32_t tap = 0; tap < 9; tap++) w[tap] = nn_tap(c, tap, n);
      const int8_t *a = rows[0] + n, *b = rows[1] + n, *d = rows[2] + n;
      const int32_t two = 2 * channels, bias = c->scales[n].bias;
      const float ratio = c->scales[n].ratio;
      for (int32_t x = 0; x < c->width_out; x++, a += step * channels, b += step * channels, d += step * channels)
        out[x * channels + n] = nn_requantise(
            bias + a[0] * w[0] + a[channels] * w[1] + a[two] * w[2] + b[0] * w[3] + b[channels] * w[4] + b[two] * w[5] +
                d[0] * w[6] + d[channels] * w[7] + d[two] * w[8],
            ratio, c->zero_out);
    }
    nn_clamp(out, c->width_out * channels, c->low, c->high);
    return;
  }
#endif
#if NN_MVE
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
#endif
    for (; n < channels; n++) *out++ = nn_depthwise_one(c, rows, x * step, n);
  }
  nn_clamp(first, c->width_out * channels, c->low, c->high);
}

// addition
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
