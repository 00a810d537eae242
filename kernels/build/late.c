/* Finds CUDA's functions when the program starts, where the loader would refuse to start it without them.
 *
 * A program that is linked to libcuda, libcublas and the others does not start where one of them is missing, and says
 * the name of a file. So every function of theirs is defined here as a jump through a slot: to the library's own where
 * the library is found, else to a function that returns an error. Nothing calls one before the program has looked which
 * libraries there are (inventory.rs), and told in a sentence what is missing.
 *
 * The allocator diverts two of the slots to itself (cuda/region.rs).
 *
 * late_functions.h lists the functions by library, LIBRARY(file) and FUNCTION(name); the build makes it from the headers.
 */
#include <dlfcn.h>
#include <string.h>

/* 3 is CUDA_ERROR_NOT_INITIALIZED. */
static long missing(void) { return 3; }

#if defined(__x86_64__)
#define JUMP(slot) "jmp *" slot "(%rip)\n"
#elif defined(__aarch64__)
#define JUMP(slot) "adrp x16, " slot "\nldr x16, [x16, #:lo12:" slot "]\nbr x16\n"
#endif

/* Hidden: the libraries call each other directly, never through here. */
#define LIBRARY(file)
#define FUNCTION(name)                                                                                 \
  __attribute__((used, visibility("hidden"))) void *late_slot_##name = (void *)missing;                 \
  __asm__(".pushsection .text.late_" #name ",\"ax\",@progbits\n.globl " #name "\n.hidden " #name        \
          "\n.type " #name ",@function\n" #name ":\n" JUMP("late_slot_" #name) ".popsection\n");
#include "late_functions.h"
#undef LIBRARY
#undef FUNCTION

/* Before every other constructor: those of compiled-in kernels register with the CUDA runtime. */
__attribute__((constructor(101))) static void find(void) {
  void *library = 0, *function = 0;
#define LIBRARY(file) library = dlopen(file, RTLD_NOW | RTLD_GLOBAL);
#define FUNCTION(name)                                                                                  \
  if (library && (function = dlsym(library, #name))) late_slot_##name = function;
#include "late_functions.h"
#undef LIBRARY
#undef FUNCTION
}

/* Leads calls of `name` to `function`. Gives what they went to before, or nothing where the library was not found. */
const void *tandem_late_divert(const char *name, const void *function) {
  void **slot = 0;
#define LIBRARY(file)
#define FUNCTION(one) \
  if (!strcmp(name, #one)) slot = &late_slot_##one;
#include "late_functions.h"
  if (!slot || *slot == (void *)missing) return 0;
  return __atomic_exchange_n(slot, (void *)function, __ATOMIC_SEQ_CST);
}
