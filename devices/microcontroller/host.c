/* Runs a C project on this machine: reads inputs from standard input, writes the outputs of each to standard output. */
#include <stdint.h>
#include <stdio.h>

#include "harness.h"

int main(int count, char **arguments) {
  (void)arguments;
  if (count > 1) return FUNCTION(NAME, _self_test)(OUTPUTS, ARENAS);
  while (1) {
    for (int i = 0; i < PLACES; i++)
      if (fread(arena.bytes + places[i].begin, 1, places[i].bytes, stdin) != places[i].bytes) return 0;
    const int code = FUNCTION(NAME, _run)(INPUTS, OUTPUTS, ARENAS);
    if (code != 0) return code;
    if (fwrite(outputs.bytes, 1, OUTPUT_BYTES, stdout) != OUTPUT_BYTES) return 100;
  }
}
