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
#define _GNU_SOURCE
#include <dlfcn.h>
#include <glob.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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

/* `file` in the folders that match `pattern`, in which `root` replaces the %s. */
static void *open_in(const char *pattern, const char *root, const char *file) {
  char folders[PATH_MAX], path[PATH_MAX + NAME_MAX];
  void *library = 0;
  glob_t found;
  if (!root || !*root || snprintf(folders, sizeof folders, pattern, root) >= (int)sizeof folders) return 0;
  if (glob(folders, GLOB_BRACE, 0, &found)) return 0;
  for (size_t i = 0; i < found.gl_pathc && !library; i++) {
    snprintf(path, sizeof path, "%s/%s", found.gl_pathv[i], file);
    if (!access(path, R_OK)) library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  }
  globfree(&found);
  return library;
}

#define WHEELS "%s/lib/python3*/site-packages/nvidia/{cu13,cudnn,nccl}/lib"

/* Opens `file`, looked for where NVIDIA's own packages look (cuda-pathfinder 1.9): what is loaded already, NVIDIA's wheels beside
 * this program or in the active environment, conda's, what the system finds, the toolkit. The driver is the system's alone.
 * 0 and dlerror() where it is in none. */
void *tandem_late_open(const char *file) {
  char program[PATH_MAX] = "";
  void *library = dlopen(file, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
  if (library) return library;
  if (!strncmp(file, "libcuda.", 8)) return dlopen(file, RTLD_NOW | RTLD_GLOBAL);
  if (readlink("/proc/self/exe", program, sizeof program - 1) > 0 &&
      (library = open_in(WHEELS, dirname(dirname(program)), file)))
    return library;
  if ((library = open_in(WHEELS, getenv("VIRTUAL_ENV"), file))) return library;
  if ((library = open_in("%s/lib", getenv("CONDA_PREFIX"), file))) return library;
  if ((library = dlopen(file, RTLD_NOW | RTLD_GLOBAL))) return library;
  const char *toolkits[] = {getenv("CUDA_HOME"), getenv("CUDA_PATH"), "/usr/local/cuda"};
  for (int i = 0; i < 3; i++)
    if ((library = open_in("%s/{lib64,lib}", toolkits[i], file))) return library;
  /* The error that is told is the system's, not that of the last folder. */
  return dlopen(file, RTLD_NOW | RTLD_GLOBAL);
}

/* Before every other constructor: those of compiled-in kernels register with the CUDA runtime. */
__attribute__((constructor(101))) static void find(void) {
  void *library = 0, *function = 0;
#define LIBRARY(file) library = tandem_late_open(file);
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
