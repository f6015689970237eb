/* The C project on this machine: inputs from standard input, one output each to standard output.
 * Compiled with -DNAME=…, -DVALUE=int8_t or float, -DINPUT_BYTES=…, -DOUTPUT_BYTES=…, -DARENA_BYTES=…, -DINPUT_OFFSET=….
 */
#include <stdint.h>
#include <stdio.h>

#define JOIN(a, b) a##b
#define FUNCTION(name, suffix) JOIN(name, suffix)

int FUNCTION(NAME, _run)(const VALUE *input, VALUE *output, void *arena);
int FUNCTION(NAME, _self_test)(VALUE *output, void *arena);

static union {
  VALUE values[ARENA_BYTES / sizeof(VALUE)];
  uint64_t aligned;
} arena;
static VALUE output[OUTPUT_BYTES / sizeof(VALUE)];

int main(int count, char **arguments) {
  (void)arguments;
  if (count > 1) return FUNCTION(NAME, _self_test)(output, &arena);
  VALUE *const image = arena.values + INPUT_OFFSET / sizeof(VALUE);
  while (fread(image, 1, INPUT_BYTES, stdin) == INPUT_BYTES) {
    const int code = FUNCTION(NAME, _run)(image, output, &arena);
    if (code != 0) return code;
    if (fwrite(output, 1, OUTPUT_BYTES, stdout) != OUTPUT_BYTES) return 100;
  }
  return 0;
}
