// The portable kernels: vectors that every processor of the architecture has.
#define BST_ISA baseline
#define BST_VECTOR_BYTES 16
#if defined(__aarch64__) || defined(_M_ARM64)
#define BST_REGISTERS 32
#else
#define BST_REGISTERS 16
#endif
#include "kernels/table.h"
