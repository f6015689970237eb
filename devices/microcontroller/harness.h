/* The memory of a generated network, for both harnesses; its own header is included before.
 * Compiled with -DNAME=…, -DINPUT_TYPE=int8_t or float …, -DINPUT_BYTES=…, -DOUTPUT_BYTES=…, -DARENA_BYTES=…, -DINPUT_OFFSET=…,
 * -DOUTPUTS=…: pointers into `outputs`, one for each output.
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

#endif
