// The kernels for x86-64 with AVX-512 (F, BW, DQ, VL); setup.py has the compiler flags.
#define BST_ISA avx512
#define BST_VECTOR_BYTES 64
#define BST_REGISTERS 32
#include "kernels/table.h"
