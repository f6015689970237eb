/* Runs a C project on this machine: reads inputs from standard input, writes the outputs of each to standard output. */
#include <stdint.h>
#include <stdio.h>

#include "harness.h"

int main(int count, char **arguments) {
  (void)arguments;
  if (count > 1) return FUNCTION(NAME, _self_test)(OUTPUTS, &arena);
  INPUT_TYPE *const image = (INPUT_TYPE *)(arena.bytes + INPUT_OFFSET);
  while (fread(image, 1, INPUT_BYTES, stdin) == INPUT_BYTES) {
    const int code = FUNCTION(NAME, _run)(image, OUTPUTS, &arena);
    if (code != 0) return code;
    if (fwrite(outputs.bytes, 1, OUTPUT_BYTES, stdout) != OUTPUT_BYTES) return 100;
  }
  return 0;
}
