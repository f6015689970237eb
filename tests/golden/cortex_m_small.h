/* small: a test
 *
 * int8, C99, no allocation, nothing of libc but memcpy and memset. Re-entrant: calls with different
 * arenas may run at the same time.
 */
#ifndef SMALL_H
#define SMALL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* One image, rows of pixels of channels (NHWC): #
 * quantised = round(real / SCALE) + ZERO_POINT, clamped to # ... # */
#define SMALL_INPUT_SIZE #
#define SMALL_INPUT_BYTES #
#define SMALL_INPUT_HEIGHT #
#define SMALL_INPUT_WIDTH #
#define SMALL_INPUT_CHANNELS #
#define SMALL_INPUT_SCALE #
#define SMALL_INPUT_ZERO_POINT (#)

/* The output: # real = (quantised - ZERO_POINT) * SCALE */
#define SMALL_OUTPUT_SIZE #
#define SMALL_OUTPUT_BYTES #
#define SMALL_OUTPUT_SCALE #
#define SMALL_OUTPUT_ZERO_POINT (#)

/* All the memory that an inference needs besides its stack, input included if it lies inside. */
#define SMALL_ARENA_BYTES #
#define SMALL_ARENA_ALIGNMENT #
/* An input inside the arena must begin this many bytes from its start; it is overwritten. */
#define SMALL_INPUT_OFFSET #

enum {
  SMALL_OK = #,
  SMALL_NULL = #,       /* a pointer is NULL */
  SMALL_MISALIGNED = #, /* the arena is not aligned to SMALL_ARENA_ALIGNMENT */
  SMALL_OVERLAP = #,    /* the output lies in the arena or the input, or the input lies in the
                              * arena elsewhere than at SMALL_INPUT_OFFSET */
  SMALL_WEIGHTS = #,    /* self-test: the weights in flash are not the ones built */
  SMALL_WRONG = #       /* self-test: another output than expected */
};

/* One inference. `input` may lie in the arena, then it is overwritten; elsewhere it is only read. */
int small_run(const int8_t *input, int8_t *output, void *arena);

/* First a CRC over the weights, then an inference on a pattern. Overwrites arena and output. */
int small_self_test(int8_t *output, void *arena);

#ifdef __cplusplus
}
#endif

#endif
