// Sixteen numbers at a time, in vectors as wide as the machine has them. The compiler's vector types make the same code
// serve x86-64 and ARM; sixteen lanes everywhere make the sums the same to the last bit on all of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef CONVNORM_VECTOR_BYTES
#error "the including file says how wide its vectors are"
#endif

namespace {

constexpr int kLanes = 16;

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class Number>
struct Native {
  typedef Number type __attribute__((vector_size(CONVNORM_VECTOR_BYTES)));
};

// The integers of a vector of floats, and half as wide vectors of sixteen bits, for what is done on the bits.
typedef uint32_t Bits __attribute__((vector_size(CONVNORM_VECTOR_BYTES)));
typedef uint64_t WideBits __attribute__((vector_size(CONVNORM_VECTOR_BYTES)));
typedef uint16_t Narrow __attribute__((vector_size(CONVNORM_VECTOR_BYTES / 2)));
using Floats = Native<float>::type;
using Doubles = Native<double>::type;

inline Floats absolute(Bits bits) {
  return (Floats)(bits & 0x7fffffffu);
}

inline Floats load_absolute(const float* from) {
  Bits bits;
  std::memcpy(&bits, from, sizeof bits);
  return absolute(bits);
}

inline Doubles load_absolute(const double* from) {
  WideBits bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Doubles)(bits & 0x7fffffffffffffffull);
}

inline Bits load_narrow(const void* from) {
  Narrow bits;
  std::memcpy(&bits, from, sizeof bits);
  return __builtin_convertvector(bits, Bits);
}

inline Floats load_absolute(const BFloat16* from) {
  return absolute(load_narrow(from) << 16);
}

inline Floats load_absolute(const Half* from) {
  const Bits half = load_narrow(from) & 0x7fffu;
  const Bits normal = (half << 13) + (112u << 23);
  const Bits denormal = (Bits)(__builtin_convertvector((Bits)half, Floats) * 0x1p-24f);
  const Bits special = (half << 13) | 0x7f800000u;  // inf and NaN
  const Bits is_denormal = (Bits)(half < 0x0400u), is_special = (Bits)(half >= 0x7c00u);
  return (Floats)((denormal & is_denormal) | (special & is_special) | (normal & ~(is_denormal | is_special)));
}

template <class Integer, int kCount>
struct Integers {
  typedef Integer type __attribute__((vector_size(kCount * sizeof(Integer))));
};

template <int kCount>
inline typename Integers<int32_t, kCount>::type load_integers(const int32_t* from) {
  typename Integers<int32_t, kCount>::type integers;
  std::memcpy(&integers, from, sizeof integers);
  return integers;
}

template <int kCount>
inline typename Integers<int32_t, kCount>::type load_integers(const int8_t* from) {
  typename Integers<int8_t, kCount>::type bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  const auto wider = __builtin_convertvector(bytes, typename Integers<int16_t, kCount>::type);
  return __builtin_convertvector(wider, typename Integers<int32_t, kCount>::type);
}

// Loops over a constant few: only once they are unrolled do their vectors stay in registers.
#define CONVNORM_UNROLL _Pragma("GCC unroll 16")

template <class Sum>
struct Lanes {
  using Vector = typename Native<Sum>::type;
  static constexpr int kPerVector = CONVNORM_VECTOR_BYTES / sizeof(Sum);
  static constexpr int kVectors = kLanes / kPerVector;
  Vector part[kVectors];

  static inline Lanes load(const Sum* from) {
    Lanes lanes;
    CONVNORM_UNROLL for (int i = 0; i < kVectors; ++i)
        std::memcpy(&lanes.part[i], from + i * kPerVector, sizeof(Vector));
    return lanes;
  }
  inline void store(Sum* to) const {
    CONVNORM_UNROLL for (int i = 0; i < kVectors; ++i) std::memcpy(to + i * kPerVector, &part[i], sizeof(Vector));
  }

  template <class Weight>
  static inline Lanes absolutes(const Weight* from) {
    Lanes lanes;
    CONVNORM_UNROLL for (int i = 0; i < kVectors; ++i) lanes.part[i] = load_absolute(from + i * kPerVector);
    return lanes;
  }

  // factor times small integers, widened in steps of two: a longer step compilers take element by element
  template <class Term>
  static inline Lanes products(Sum factor, const Term* terms) {
    Lanes lanes;
    CONVNORM_UNROLL for (int i = 0; i < kVectors; ++i) lanes.part[i] =
        factor * __builtin_convertvector(load_integers<kPerVector>(terms + i * kPerVector), Vector);
    return lanes;
  }

  inline Lanes& operator+=(const Lanes& other) {
    CONVNORM_UNROLL for (int i = 0; i < kVectors; ++i) part[i] += other.part[i];
    return *this;
  }

  // by halves, which takes four additions' time rather than sixteen's
  inline double sum() const {
    Sum lanes[kLanes];
    store(lanes);
    double sums[kLanes];
    for (int l = 0; l < kLanes; ++l) sums[l] = lanes[l];
    CONVNORM_UNROLL for (int half = kLanes / 2; half > 0; half /= 2) for (int l = 0; l < half; ++l) sums[l] +=
        sums[l + half];
    return sums[0];
  }
};

}  // namespace
