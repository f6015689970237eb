/* Included before a C project: each step begins with two hints that no core obeys, and that thumb.c counts by. */
#define NN_STEP(step) \
  __asm__ volatile(".inst.w 0xf3af80c0 + %c0\n.inst.w 0xf3af8080 + %c1" : : "i"((step) / 64), "i"((step) % 64) : "memory")
