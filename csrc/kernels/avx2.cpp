// The kernels for x86-64 with AVX2 and FMA; setup.py has the compiler flags.
#define BST_ISA avx2
#define BST_VECTOR_BYTES 32
#define BST_REGISTERS 16
#include "kernels/table.h"
