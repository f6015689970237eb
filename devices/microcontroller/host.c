/* Runs a C project on this machine: reads inputs from standard input, writes an output for each to standard output. */
#include <stdint.h>
#include <stdio.h>

#include "harness.h"

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
