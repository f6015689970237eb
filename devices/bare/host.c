/* The C project on this machine: inputs from standard input, one output each to standard output.
 * Compiled with -DNAME=…, -DINPUT_BYTES=…, -DOUTPUT_BYTES=…, -DARENA_BYTES=…, -DINPUT_OFFSET=….
 */
#include <stdint.h>
#include <stdio.h>

#define JOIN(a, b) a##b
#define FUNCTION(name, suffix) JOIN(name, suffix)

int FUNCTION(NAME, _run)(const int8_t *input, int8_t *output, void *arena);
int FUNCTION(NAME, _self_test)(int8_t *output, void *arena);

static union {
  int8_t bytes[ARENA_BYTES];
  uint64_t aligned;
} arena;
static int8_t output[OUTPUT_BYTES];

int main(int count, char **arguments) {
  (void)arguments;
  if (count > 1) return FUNCTION(NAME, _self_test)(output, &arena);
  while (fread(arena.bytes + INPUT_OFFSET, 1, INPUT_BYTES, stdin) == INPUT_BYTES) {
    const int code = FUNCTION(NAME, _run)(arena.bytes + INPUT_OFFSET, output, &arena);
    if (code != 0) return code;
    if (fwrite(output, 1, OUTPUT_BYTES, stdout) != OUTPUT_BYTES) return 100;
  }
  return 0;
}
