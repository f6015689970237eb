/* The functions and the memory of a generated network, for both harnesses.
 * Compiled with -DNAME=…, -DVALUE=int8_t or float, -DINPUT_BYTES=…, -DOUTPUT_BYTES=…, -DARENA_BYTES=…, -DINPUT_OFFSET=….
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <stdint.h>

#define JOIN(a, b) a##b
#define FUNCTION(name, suffix) JOIN(name, suffix)

int FUNCTION(NAME, _run)(const VALUE *input, VALUE *output, void *arena);
int FUNCTION(NAME, _self_test)(VALUE *output, void *arena);

static union {
  VALUE values[ARENA_BYTES / sizeof(VALUE)];
  uint64_t aligned;
} arena;
static VALUE output[OUTPUT_BYTES / sizeof(VALUE)];

#endif
