// The inner loops of stream_cpu.cpp; see vectors.h.

constexpr int64_t kPanel = 2 * Vector::kLanes;  // columns of a block of a matrix product that stays in registers

// `n` of kLanes elements; the others are zero.
template <class Element>
LESA_INLINE LESA_KERNEL typename Vector::Register load_some(const typename Element::Bits* from, int64_t n) {
  if (n >= Vector::kLanes) return Vector::template load<Element>(from);
  float values[Vector::kLanes] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = Element::load(from[i]);
  return Vector::template load<Float32>(values);
}

// Brings the matrices of a residual into the order in which they are read, for the channels [begin, end). `begin` is a
// multiple of a vector.
template <class Element>
LESA_KERNEL void pack(const StreamForecast& p, const Matrices& m, int64_t begin, int64_t end) {
  using Bits = typename Element::Bits;
  constexpr int64_t lanes = Vector::kLanes;
  typename Vector::Register block[lanes];
  for (int64_t d = begin; d < end; d += lanes) {
    for (int64_t first = 0; first < m.padded_rank; first += lanes) {
      for (size_t c = 0; c < m.inputs.size(); ++c) {
        for (int64_t i = 0; i < lanes; ++i) {
          block[i] = Vector::broadcast(0.0f);
          if (first + i >= p.rank) continue;
          const Bits* row = static_cast<const Bits*>(p.down) + (m.stage * p.rank + first + i) * (p.history - 1) * p.dim;
          for (int64_t j = 0; j < p.history - 1; ++j) {
            const auto values = load_some<Element>(row + j * p.dim + d, p.dim - d);
            block[i] = Vector::multiply_add(values, Vector::broadcast(m.inputs[c].weights[j]), block[i]);
          }
        }
        Vector::transpose(block);
        float* target = m.projections + (c * m.padded_dim + d) * m.padded_rank + first;
        for (int64_t i = 0; i < lanes; ++i) Vector::template store<Float32>(target + i * m.padded_rank, block[i]);
      }
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t channel = m.stage * p.dim + d + i;
        block[i] = Vector::broadcast(0.0f);
        if (d + i < p.dim && first < p.rank) {
          block[i] = load_some<Element>(static_cast<const Bits*>(p.up) + channel * p.rank + first, p.rank - first);
        }
      }
      Vector::transpose(block);
      float* panel = m.up + d / kPanel * kPanel * p.rank + d % kPanel;
      for (int64_t r = first; r < std::min(first + lanes, p.rank); ++r) {
        Vector::template store<Float32>(panel + r * kPanel, block[r - first]);
      }
    }
  }
}

template <class Element>
LESA_INLINE LESA_KERNEL const typename Element::Bits* anchor(const StreamForecast& p, const Sample& s, int64_t k,
                                                             int64_t token) {
  return static_cast<const typename Element::Bits*>(s.features[k]) + token * p.token_stride;
}

// The weighted sum of the features of one token, for `kVectors` vectors of channels. It is added to `base`, or to the
// sample's constant if that is null.
template <class Element, bool kPerChannel, int kVectors>
LESA_INLINE LESA_KERNEL void mix_block(const StreamForecast& p, const Sample& s, int64_t token, int64_t d,
                                       const float* base, typename Element::Bits* output) {
  typename Vector::Register sums[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    sums[v] = base ? Vector::template load<Float32>(base + v * Vector::kLanes) : Vector::broadcast(s.constant);
  }
  for (int64_t k = 0; k < s.anchors; ++k) {
    const auto* feature = anchor<Element>(p, s, k, token) + d;
    const float* weights = s.weights + (kPerChannel ? k * p.dim + d : k);
    for (int v = 0; v < kVectors; ++v) {
      const auto weight = kPerChannel ? Vector::template load<Float32>(weights + v * Vector::kLanes)
                                      : Vector::broadcast(*weights);
      sums[v] = Vector::multiply_add(weight, Vector::template load<Element>(feature + v * Vector::kLanes), sums[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) Vector::template store<Element>(output + v * Vector::kLanes, sums[v]);
}

// The same for channels [first, first + n). `base` and `output` belong to the first one.
template <class Element, bool kPerChannel, int kVectors>
LESA_INLINE LESA_KERNEL void mix(const StreamForecast& p, const Sample& s, int64_t token, int64_t first, int64_t n,
                                 const float* base, typename Element::Bits* output) {
  constexpr int64_t step = kVectors * Vector::kLanes;
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    mix_block<Element, kPerChannel, kVectors>(p, s, token, first + i, base ? base + i : nullptr, output + i);
  }
  for (; i < n; ++i) {
    float sum = base ? base[i] : s.constant;
    for (int64_t k = 0; k < s.anchors; ++k) {
      const float weight = s.weights[kPerChannel ? k * p.dim + first + i : k];
      sum = Vector::multiply_add(weight, Element::load(anchor<Element>(p, s, k, token)[first + i]), sum);
    }
    output[i] = Element::store(sum);
  }
}

// What a residual reads of one feature: [rows, kGroup]. For the newest feature the values themselves, for others the
// differences to it.
template <class Element>
LESA_KERNEL void subtract_newest(const StreamForecast& p, const Sample& s, int64_t k, int64_t token, int64_t rows,
                                 int64_t first, int64_t n, float* differences) {
  for (int64_t row = 0; row < rows; ++row) {
    const auto* newest = anchor<Element>(p, s, 0, token + row) + first;
    const auto* feature = anchor<Element>(p, s, k, token + row) + first;
    float* target = differences + row * kGroup;
    int64_t d = 0;
    for (; d + Vector::kLanes <= n; d += Vector::kLanes) {
      auto value = Vector::template load<Element>(feature + d);
      if (k > 0) value = Vector::subtract(value, Vector::template load<Element>(newest + d));
      Vector::template store<Float32>(target + d, value);
    }
    for (; d < n; ++d) target[d] = k > 0 ? Element::load(feature[d]) - Element::load(newest[d]) : Element::load(feature[d]);
  }
}

// sums[rows, kPanel] += a[rows, depth] @ b[depth, kPanel]; `rows` is at most kRows.
template <int kTile = Vector::kRows>
LESA_KERNEL void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                          int64_t rows, float* sums, int64_t sums_stride) {
  if constexpr (kTile > 1) {
    if (rows < kTile) return multiply<kTile - 1>(a, a_stride, b, b_stride, depth, rows, sums, sums_stride);
  }
  typename Vector::Register block[kTile][2];
  LESA_UNROLL for (int row = 0; row < kTile; ++row) {
    block[row][0] = Vector::template load<Float32>(sums + row * sums_stride);
    block[row][1] = Vector::template load<Float32>(sums + row * sums_stride + Vector::kLanes);
  }
  for (int64_t i = 0; i < depth; ++i) {
    const auto left = Vector::template load<Float32>(b + i * b_stride);
    const auto right = Vector::template load<Float32>(b + i * b_stride + Vector::kLanes);
    LESA_UNROLL for (int row = 0; row < kTile; ++row) {
      const auto value = Vector::broadcast(a[row * a_stride + i]);
      block[row][0] = Vector::multiply_add(value, left, block[row][0]);
      block[row][1] = Vector::multiply_add(value, right, block[row][1]);
    }
  }
  LESA_UNROLL for (int row = 0; row < kTile; ++row) {
    Vector::template store<Float32>(sums + row * sums_stride, block[row][0]);
    Vector::template store<Float32>(sums + row * sums_stride + Vector::kLanes, block[row][1]);
  }
}

// Fetches features that are needed soon: `n` channels from `first` on, of some tokens.
template <class Element>
LESA_INLINE LESA_KERNEL void fetch(const StreamForecast& p, const Sample& s, int64_t k, int64_t token, int64_t rows,
                                   int64_t first, int64_t n) {
  constexpr int64_t item = sizeof(typename Element::Bits);
  for (int64_t row = 0; row < rows; ++row) {
    const char* from = reinterpret_cast<const char*>(anchor<Element>(p, s, k, token + row) + first);
    for (int64_t at = 0; at < n * item; at += kCacheLine) prefetch(from + at);
  }
}

// The forecast of `rows` tokens, at most kRows, with a residual. `input`, the residual's input, has room for
// [rows, padded_rank].
template <class Element, bool kPerChannel>
LESA_KERNEL void forecast_rows(const StreamForecast& p, const Sample& s, int64_t token, int64_t rows, float* input,
                               typename Element::Bits* output) {
  const Matrices& m = *s.matrices;
  alignas(kCacheLine) float differences[Vector::kRows * kGroup];
  std::fill_n(input, rows * m.padded_rank, 0.0f);
  for (int64_t d = 0; d < p.dim; d += kGroup) {
    const int64_t n = std::min(kGroup, p.dim - d);
    const int64_t ahead = std::min(kGroup, p.dim - d - n);
    for (size_t c = 0; c < m.inputs.size(); ++c) {
      const int64_t k = m.inputs[c].anchor;
      fetch<Element>(p, s, k, token, rows, d + n, ahead);
      if (c == 0 && k > 0) fetch<Element>(p, s, 0, token, rows, d + n, ahead);
      subtract_newest<Element>(p, s, k, token, rows, d, n, differences);
      const float* projection = m.projections + (c * m.padded_dim + d) * m.padded_rank;
      for (int64_t r = 0; r < m.padded_rank; r += kPanel) {
        multiply(differences, kGroup, projection + r, m.padded_rank, n, rows, input + r, m.padded_rank);
      }
    }
  }
  alignas(kCacheLine) float residual[Vector::kRows * kPanel];
  for (int64_t d = 0; d < p.dim; d += kPanel) {
    const int64_t n = std::min(kPanel, p.dim - d);
    const int64_t ahead = std::min(kPanel, p.dim - d - n);
    for (int64_t k = 0; k < s.anchors; ++k) fetch<Element>(p, s, k, token, rows, d + n, ahead);
    for (int64_t row = 0; row < rows; ++row) {
      float* start = residual + row * kPanel;
      if (s.constants) std::copy_n(s.constants + d, n, start);
      std::fill(start + (s.constants ? n : 0), start + kPanel, s.constant);
    }
    multiply(input, m.padded_rank, m.up + d * p.rank, kPanel, p.rank, rows, residual, kPanel);
    for (int64_t row = 0; row < rows; ++row) {
      mix<Element, kPerChannel, 2>(p, s, token + row, d, n, residual + row * kPanel, output + row * p.dim + d);
    }
  }
}

template <class Element, bool kPerChannel>
LESA_KERNEL void forecast_weighted(const StreamForecast& p, const Sample& s, int64_t begin, int64_t end) {
  auto* output = static_cast<typename Element::Bits*>(s.output);
  if (s.matrices == nullptr) {
    for (int64_t token = begin; token < end; ++token) {
      mix<Element, kPerChannel, 4>(p, s, token, 0, p.dim, s.constants, output + token * p.dim);
    }
    return;
  }
  AlignedFloats input(Vector::kRows * s.matrices->padded_rank);
  for (int64_t token = begin; token < end; token += Vector::kRows) {
    const int64_t rows = std::min<int64_t>(Vector::kRows, end - token);
    forecast_rows<Element, kPerChannel>(p, s, token, rows, input.begin(), output + token * p.dim);
  }
}

template <class Element>
LESA_KERNEL void forecast(const StreamForecast& p, const Sample& s, int64_t begin, int64_t end) {
  if (s.anchors == 0) {
    auto* output = static_cast<typename Element::Bits*>(s.output);
    std::fill(output + begin * p.dim, output + end * p.dim, Element::kNan);
  } else if (p.anchors_per_channel) {
    forecast_weighted<Element, true>(p, s, begin, end);
  } else {
    forecast_weighted<Element, false>(p, s, begin, end);
  }
}

constexpr Kernels kKernels{kPanel,
                           Vector::kRows,
                           {pack<Float32>, pack<Float16>, pack<BFloat16>},
                           {forecast<Float32>, forecast<Float16>, forecast<BFloat16>}};
