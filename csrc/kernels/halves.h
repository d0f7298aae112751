// Half precision to float.

BST_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

void widen_bfloat16(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_bits(static_cast<uint32_t>(from[i]) << 16);
}

void widen_float16(const uint16_t* from, float* to, int64_t n) {
  // Exponent and fraction move to float's places. Then only the exponent's bias differs, 15 and
  // 127: a factor of 2^112, for subnormals too. An exponent of all ones (inf, NaN) stays all ones.
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t half = from[i];
    const uint32_t sign = (half & 0x8000u) << 16, rest = (half & 0x7fffu) << 13;
    const float magnitude = from_bits(rest) * 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    bits |= (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    to[i] = from_bits(bits | sign);
  }
}
