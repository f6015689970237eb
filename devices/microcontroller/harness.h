/* The memory of a generated network, for both harnesses; its own header is included before.
 * Compiled with -DNAME=…, -DOUTPUT_BYTES=…, -DARENA_BYTES=…, -DINPUTS=… and -DOUTPUTS=…: pointers into `arena` and
 * `outputs`, one for each; -DARENAS=…: of each memory that the arena is split over, where its part begins; -DINPUT_PLACES=…: of each input where in the arena it begins, and its bytes.
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <stdint.h>

#define JOIN(a, b) a##b
#define FUNCTION(name, suffix) JOIN(name, suffix)

static union {
  uint8_t bytes[ARENA_BYTES];
  uint64_t aligned;
} arena;
static union {
  uint8_t bytes[OUTPUT_BYTES];
  uint64_t aligned;
} outputs;

static const struct {
  uint32_t begin, bytes;
} places[] = {INPUT_PLACES};
enum { PLACES = sizeof places / sizeof places[0] };

#endif
