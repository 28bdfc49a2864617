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

// The part of the projections for the group of channel `d`, and for the panel of rank `r`: [kGroup, kPanel].
LESA_INLINE LESA_KERNEL float* projection_of(const Matrices& m, int64_t input, int64_t d, int64_t r) {
  const int64_t block = d / kGroup * static_cast<int64_t>(m.inputs.size()) + input;
  return m.projections + block * kGroup * m.padded_rank + r / kPanel * kGroup * kPanel;
}

// Brings the matrices of a residual into the order in which they are read, for the channels [begin, end). `begin` is a
// multiple of a vector.
template <class Element>
LESA_KERNEL void pack(const StreamForecast& p, const Matrices& m, int64_t begin, int64_t end) {
  using Bits = typename Element::Bits;
  constexpr int64_t lanes = Vector::kLanes;
  const int64_t taps = p.history - 1;
  const auto* down = static_cast<const Bits*>(p.down) + m.stage * p.rank * taps * p.dim;
  const auto* up = static_cast<const Bits*>(p.up) + m.stage * p.dim * p.rank;
  typename Vector::Register block[lanes];
  for (int64_t d = begin; d < end; d += lanes) {
    const int64_t channels = std::min(lanes, p.dim - d);
    for (int64_t first = 0; first < m.padded_rank; first += lanes) {
      const int64_t ranks = std::max<int64_t>(0, std::min(lanes, p.rank - first));
      for (size_t c = 0; c < m.inputs.size(); ++c) {
        const float* weights = m.inputs[c].weights.data();
        for (int64_t i = 0; i < ranks; ++i) {
          const Bits* row = down + (first + i) * taps * p.dim + d;
          auto sum = Vector::broadcast(0.0f);
          for (int64_t j = 0; j < taps; ++j) {
            if (c == 0) prefetch(row + j * p.dim + lanes);
            const auto values = load_some<Element>(row + j * p.dim, channels);
            sum = Vector::multiply_add(values, Vector::broadcast(weights[j]), sum);
          }
          block[i] = sum;
        }
        for (int64_t i = ranks; i < lanes; ++i) block[i] = Vector::broadcast(0.0f);
        Vector::transpose(block);
        float* target = projection_of(m, c, d, first) + d % kGroup * kPanel + first % kPanel;
        for (int64_t i = 0; i < lanes; ++i) Vector::template store<Float32>(target + i * kPanel, block[i]);
      }
      if (ranks == 0) continue;
      for (int64_t i = 0; i < channels; ++i) block[i] = load_some<Element>(up + (d + i) * p.rank + first, ranks);
      for (int64_t i = channels; i < lanes; ++i) block[i] = Vector::broadcast(0.0f);
      Vector::transpose(block);
      float* panel = m.up + d / kPanel * kPanel * p.rank + first * kPanel + d % kPanel;
      for (int64_t r = 0; r < ranks; ++r) Vector::template store<Float32>(panel + r * kPanel, block[r]);
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
template <class Element, bool kPerChannel, int kVectors, bool kStreamed>
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
  for (int v = 0; v < kVectors; ++v) Vector::template store<Element, kStreamed>(output + v * Vector::kLanes, sums[v]);
}

// The same for channels [first, first + n). `base` and `output` belong to the first one.
template <class Element, bool kPerChannel, int kVectors, bool kStreamed = false>
LESA_INLINE LESA_KERNEL void mix(const StreamForecast& p, const Sample& s, int64_t token, int64_t first, int64_t n,
                                 const float* base, typename Element::Bits* output) {
  constexpr int64_t step = kVectors * Vector::kLanes;
  int64_t i = 0;
  for (; i + step <= n; i += step) {
    mix_block<Element, kPerChannel, kVectors, kStreamed>(p, s, token, first + i, base ? base + i : nullptr, output + i);
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

// What a residual reads of one vector of channels of a token: of the newest feature the values, of others the
// differences to it. Fetches what comes `kGroup` channels later.
template <class Element>
LESA_INLINE LESA_KERNEL void subtract_newest(const StreamForecast& p, const Sample& s, int64_t token, int64_t d,
                                             float* differences, int64_t stride) {
  const auto* from = anchor<Element>(p, s, 0, token) + d;
  const auto newest = Vector::template load<Element>(from);
  prefetch_far(from + kGroup);
  for (const Input& input : s.matrices->inputs) {
    auto value = newest;
    if (input.anchor > 0) {
      const auto* feature = anchor<Element>(p, s, input.anchor, token) + d;
      value = Vector::subtract(Vector::template load<Element>(feature), newest);
      prefetch_far(feature + kGroup);
    }
    Vector::template store<Float32>(differences, value);
    differences += stride;
  }
}

// The same for the `n` channels that are left at the end.
template <class Element>
LESA_KERNEL void subtract_newest_one_by_one(const StreamForecast& p, const Sample& s, int64_t token, int64_t rows,
                                            int64_t first, int64_t n, float* differences) {
  for (const Input& input : s.matrices->inputs) {
    for (int64_t row = 0; row < rows; ++row) {
      const auto* newest = anchor<Element>(p, s, 0, token + row) + first;
      const auto* feature = anchor<Element>(p, s, input.anchor, token + row) + first;
      for (int64_t i = 0; i < n; ++i) {
        const float value = Element::load(feature[i]);
        differences[row * kGroup + i] = input.anchor > 0 ? value - Element::load(newest[i]) : value;
      }
    }
    differences += rows * kGroup;
  }
}

// sums[kTile, kPanel] += a[kTile, depth] @ b[depth, kPanel]. Fetches what is in memory `ahead` floats after b.
template <int kTile>
LESA_INLINE LESA_KERNEL void multiply(const float* a, int64_t a_stride, const float* b, int64_t depth, int64_t ahead,
                                      typename Vector::Register (&sums)[kTile][2]) {
  for (int64_t i = 0; i < depth; ++i) {
    const auto left = Vector::template load<Float32>(b + i * kPanel);
    const auto right = Vector::template load<Float32>(b + i * kPanel + Vector::kLanes);
    prefetch(b + i * kPanel + ahead);
    if (Vector::kLanes * sizeof(float) >= kCacheLine) prefetch(b + i * kPanel + Vector::kLanes + ahead);
    LESA_UNROLL for (int row = 0; row < kTile; ++row) {
      const auto value = Vector::broadcast(a[row * a_stride + i]);
      sums[row][0] = Vector::multiply_add(value, left, sums[row][0]);
      sums[row][1] = Vector::multiply_add(value, right, sums[row][1]);
    }
  }
}

// The residual's input of kTile tokens: [kTile, padded_rank]. The differences of the next channels are computed between
// the products, which wait for nothing but the multipliers.
template <class Element, int kTile>
LESA_KERNEL void project(const StreamForecast& p, const Sample& s, int64_t token, float* differences, float* input) {
  constexpr int64_t parts = kGroup / Vector::kLanes, units = kTile * parts;
  const Matrices& m = *s.matrices;
  const int64_t inputs = static_cast<int64_t>(m.inputs.size()), size = inputs * kTile * kGroup;
  float* current = differences;
  float* next = differences + size;
  const auto subtract = [&](int64_t first, int64_t unit, float* target) LESA_KERNEL {
    const int64_t row = unit / parts, at = unit % parts * Vector::kLanes;
    subtract_newest<Element>(p, s, token + row, first + at, target + row * kGroup + at, kTile * kGroup);
  };
  std::fill_n(input, kTile * m.padded_rank, 0.0f);
  if (p.dim >= kGroup) {
    for (int64_t unit = 0; unit < units; ++unit) subtract(0, unit, current);
  } else {
    subtract_newest_one_by_one<Element>(p, s, token, kTile, 0, p.dim, current);
  }
  for (int64_t d = 0; d < p.dim; d += kGroup) {
    const int64_t n = std::min(kGroup, p.dim - d), left = p.dim - d - n;
    int64_t unit = left >= kGroup ? 0 : units;
    for (int64_t r = 0; r < m.padded_rank; r += kPanel) {
      for (int64_t first = 0; first < inputs; first += kInputs) {
        // A long sum loses more to rounding than the sum of short ones.
        typename Vector::Register sums[kTile][2];
        LESA_UNROLL for (int row = 0; row < kTile; ++row) sums[row][0] = sums[row][1] = Vector::broadcast(0.0f);
        for (int64_t c = first; c < std::min(first + kInputs, inputs); ++c) {
          const float* projection = projection_of(m, c, d, r);
          for (int64_t i = 0; i < n; i += kStep) {
            if (unit < units) subtract(d + n, unit++, next);
            multiply<kTile>(current + c * kTile * kGroup + i, kGroup, projection + i * kPanel, std::min(kStep, n - i),
                            kGroup * m.padded_rank, sums);
          }
        }
        LESA_UNROLL for (int row = 0; row < kTile; ++row) {
          LESA_UNROLL for (int half = 0; half < 2; ++half) {
            float* total = input + row * m.padded_rank + r + half * Vector::kLanes;
            Vector::template store<Float32>(total, Vector::add(sums[row][half], Vector::template load<Float32>(total)));
          }
        }
      }
    }
    for (; unit < units; ++unit) subtract(d + n, unit, next);
    if (left > 0 && left < kGroup) subtract_newest_one_by_one<Element>(p, s, token, kTile, d + n, left, next);
    std::swap(current, next);
  }
}

// The forecast of kTile tokens from the residual's input. The features are added between the products.
// Rows of `output` are `stride` elements apart.
template <class Element, bool kPerChannel, int kTile, bool kStreamed = false>
LESA_KERNEL void finish(const StreamForecast& p, const Sample& s, int64_t token, const float* input,
                        typename Element::Bits* output, int64_t stride) {
  const Matrices& m = *s.matrices;
  for (int64_t d = 0; d < p.dim; d += kPanel) {
    const int64_t n = std::min(kPanel, p.dim - d);
    auto left_start = Vector::broadcast(s.constant), right_start = left_start;
    if (s.constants) {
      left_start = load_some<Float32>(s.constants + d, n);
      right_start = load_some<Float32>(s.constants + d + Vector::kLanes, n - Vector::kLanes);
    }
    typename Vector::Register sums[kTile][2];
    LESA_UNROLL for (int row = 0; row < kTile; ++row) {
      sums[row][0] = left_start;
      sums[row][1] = right_start;
    }
    const float* up = m.up + d * p.rank;
    const int64_t added = n == kPanel ? s.anchors : 0;
    int64_t r = 0;
    for (int64_t k = 0; k < added; ++k) {
      const int64_t end = (k + 1) * p.rank / s.anchors;
      multiply<kTile>(input + r, m.padded_rank, up + r * kPanel, end - r, kPanel * p.rank, sums);
      r = end;
      const float* weights = s.weights + (kPerChannel ? k * p.dim + d : k);
      const auto left = kPerChannel ? Vector::template load<Float32>(weights) : Vector::broadcast(*weights);
      const auto right = kPerChannel ? Vector::template load<Float32>(weights + Vector::kLanes) : left;
      const auto* feature = anchor<Element>(p, s, k, token) + d;
      LESA_UNROLL for (int row = 0; row < kTile; ++row) {
        const auto* from = feature + row * p.token_stride;
        prefetch_far(from + 4 * kPanel);
        if (!kStreamed && k == 0) prefetch_to_write(output + row * stride + d + 4 * kPanel);
        sums[row][0] = Vector::multiply_add(left, Vector::template load<Element>(from), sums[row][0]);
        sums[row][1] = Vector::multiply_add(right, Vector::template load<Element>(from + Vector::kLanes), sums[row][1]);
      }
    }
    if (added > 0) {
      LESA_UNROLL for (int row = 0; row < kTile; ++row) {
        Vector::template store<Element, kStreamed>(output + row * stride + d, sums[row][0]);
        Vector::template store<Element, kStreamed>(output + row * stride + d + Vector::kLanes, sums[row][1]);
      }
      continue;
    }
    multiply<kTile>(input, m.padded_rank, up, p.rank, 0, sums);
    alignas(kCacheLine) float residual[kTile][kPanel];
    LESA_UNROLL for (int row = 0; row < kTile; ++row) {
      Vector::template store<Float32>(residual[row], sums[row][0]);
      Vector::template store<Float32>(residual[row] + Vector::kLanes, sums[row][1]);
    }
    for (int row = 0; row < kTile; ++row) {
      mix<Element, kPerChannel, 1>(p, s, token + row, d, n, residual[row], output + row * stride + d);
    }
  }
}

// The forecast of tokens [begin, end) with a residual, kTile at a time while there are so many.
template <class Element, bool kPerChannel, int kTile, bool kStreamed>
LESA_KERNEL void forecast_tiles(const StreamForecast& p, const Sample& s, int64_t begin, int64_t end,
                                float* differences, float* input) {
  auto* output = static_cast<typename Element::Bits*>(s.output);
  for (; begin + kTile <= end; begin += kTile) {
    project<Element, kTile>(p, s, begin, differences, input);
    finish<Element, kPerChannel, kTile, kStreamed>(p, s, begin, input, output + begin * p.dim, p.dim);
  }
  if constexpr (kTile > 1) {
    if (begin < end) {
      forecast_tiles<Element, kPerChannel, kTile / 2, kStreamed>(p, s, begin, end, differences, input);
    }
  }
}

template <class Element, bool kPerChannel, bool kStreamed>
LESA_KERNEL void forecast_weighted(const StreamForecast& p, const Sample& s, int64_t begin, int64_t end) {
  if (s.matrices == nullptr) {
    auto* output = static_cast<typename Element::Bits*>(s.output);
    for (int64_t token = begin; token < end; ++token) {
      mix<Element, kPerChannel, 4, kStreamed>(p, s, token, 0, p.dim, s.constants, output + token * p.dim);
    }
    return;
  }
  const int64_t inputs = static_cast<int64_t>(s.matrices->inputs.size());
  const int64_t differences = 2 * inputs * Vector::kRows * kGroup;
  const AlignedFloats scratch(differences + Vector::kRows * s.matrices->padded_rank);
  forecast_tiles<Element, kPerChannel, Vector::kRows, kStreamed>(p, s, begin, end, scratch.begin(),
                                                                 scratch.begin() + differences);
}

template <class Element, bool kStreamed>
LESA_KERNEL void forecast_stored(const StreamForecast& p, const Sample& s, int64_t begin, int64_t end) {
  if (p.anchors_per_channel) {
    forecast_weighted<Element, true, kStreamed>(p, s, begin, end);
  } else {
    forecast_weighted<Element, false, kStreamed>(p, s, begin, end);
  }
}

template <class Element>
LESA_KERNEL void forecast(const StreamForecast& p, const Sample& s, int64_t begin, int64_t end) {
  if (s.anchors == 0) {
    auto* output = static_cast<typename Element::Bits*>(s.output);
    std::fill(output + begin * p.dim, output + end * p.dim, Element::kNan);
  } else if (s.streamed) {
    forecast_stored<Element, Vector::template kStreams<Element>>(p, s, begin, end);
  } else {
    forecast_stored<Element, false>(p, s, begin, end);
  }
}

// Brings the channels [begin, end) of a head's projection into the order in which they are read.
LESA_KERNEL void pack_head(const StreamForecast& p, const StreamHead& head, const Projection& projection, int64_t begin,
                           int64_t end) {
  constexpr int64_t lanes = Vector::kLanes;
  typename Vector::Register block[lanes];
  for (int64_t d = begin; d < end; d += lanes) {
    const int64_t channels = std::min(lanes, p.dim - d);
    for (int64_t first = 0; first < round_up(head.outputs, kPanel); first += lanes) {
      const int64_t outputs = std::max<int64_t>(0, std::min(lanes, head.outputs - first));
      const float* rows = head.weight + first * p.dim + d;
      for (int64_t i = 0; i < outputs; ++i) block[i] = load_some<Float32>(rows + i * p.dim, channels);
      for (int64_t i = outputs; i < lanes; ++i) block[i] = Vector::broadcast(0.0f);
      Vector::transpose(block);
      float* target = projection.weight + (first / kPanel * p.dim + d) * kPanel + first % kPanel;
      for (int64_t i = 0; i < channels; ++i) Vector::template store<Float32>(target + i * kPanel, block[i]);
    }
  }
}

// The sum of `value(x[i])` over all of x, and `left(x[i])` in its place for what is left at the end. Short sums are
// added up, since a long one loses more to rounding.
template <class Value, class Left>
LESA_INLINE LESA_KERNEL float sum_of(const float* x, int64_t n, const Value& value, const Left& left) {
  constexpr int64_t lanes = Vector::kLanes, parts = 4;
  typename Vector::Register sums[parts];
  LESA_UNROLL for (int64_t v = 0; v < parts; ++v) sums[v] = Vector::broadcast(0.0f);
  int64_t i = 0;
  for (; i + parts * lanes <= n; i += parts * lanes) {
    LESA_UNROLL for (int64_t v = 0; v < parts; ++v) sums[v] = value(x + i + v * lanes, sums[v]);
  }
  for (; i + lanes <= n; i += lanes) sums[0] = value(x + i, sums[0]);
  float each[lanes], total = 0.0f;
  const auto pairs = Vector::add(Vector::add(sums[0], sums[1]), Vector::add(sums[2], sums[3]));
  Vector::template store<Float32>(each, pairs);
  for (int64_t lane = 0; lane < lanes; ++lane) total += each[lane];
  for (; i < n; ++i) total += left(x[i]);
  return total;
}

// The mean of one token's channels.
LESA_INLINE LESA_KERNEL float mean_of(int64_t dim, const float* x) {
  return sum_of(
      x, dim, [](const float* at, const auto& sum) LESA_KERNEL { return Vector::add(Vector::template load<Float32>(at), sum); },
      [](float value) { return value; }) / static_cast<float>(dim);
}

// The mean square of what they are apart from `mean`.
LESA_INLINE LESA_KERNEL float variance_of(int64_t dim, float mean, const float* x) {
  const auto centre = Vector::broadcast(mean);
  return sum_of(
      x, dim,
      [&](const float* at, const auto& sum) LESA_KERNEL {
        const auto apart = Vector::subtract(Vector::template load<Float32>(at), centre);
        return Vector::multiply_add(apart, apart, sum);
      },
      [&](float value) { return (value - mean) * (value - mean); }) / static_cast<float>(dim);
}

// The norm of one token, and its modulation, in place. `shift` may be null.
LESA_INLINE LESA_KERNEL void modulate(int64_t dim, Norm norm, float eps, const float* scale, const float* shift,
                                      float* x) {
  const float mean = norm == Norm::layer ? mean_of(dim, x) : 0.0f;
  const float inverse = norm == Norm::none ? 1.0f : 1.0f / std::sqrt(variance_of(dim, mean, x) + eps);
  const auto centre = Vector::broadcast(mean);
  const auto zero = Vector::broadcast(0.0f), one = Vector::broadcast(1.0f), factor = Vector::broadcast(inverse);
  int64_t i = 0;
  for (; i + Vector::kLanes <= dim; i += Vector::kLanes) {
    const auto apart = Vector::subtract(Vector::template load<Float32>(x + i), centre);
    const auto normed = Vector::multiply_add(apart, factor, zero);
    const auto scaled = Vector::add(Vector::template load<Float32>(scale + i), one);
    const auto added = shift ? Vector::template load<Float32>(shift + i) : zero;
    Vector::template store<Float32>(x + i, Vector::multiply_add(normed, scaled, added));
  }
  for (; i < dim; ++i) x[i] = (x[i] - mean) * inverse * (1.0f + scale[i]) + (shift ? shift[i] : 0.0f);
}

// The projection of kTile tokens, whose features are `stride` floats apart.
template <int kTile>
LESA_KERNEL void apply_head(const StreamForecast& p, const StreamHead& head, const Projection& projection,
                            const float* features, int64_t stride, float* output) {
  for (int64_t first = 0; first < head.outputs; first += kPanel) {
    alignas(kCacheLine) float totals[kTile][kPanel];
    LESA_UNROLL for (int row = 0; row < kTile; ++row) {
      std::copy_n(projection.bias + first, kPanel, totals[row]);
    }
    for (int64_t d = 0; d < p.dim; d += kHeadChannels) {
      typename Vector::Register sums[kTile][2];
      LESA_UNROLL for (int row = 0; row < kTile; ++row) sums[row][0] = sums[row][1] = Vector::broadcast(0.0f);
      const float* weight = projection.weight + (first / kPanel * p.dim + d) * kPanel;
      multiply<kTile>(features + d, stride, weight, std::min(kHeadChannels, p.dim - d), 8 * kPanel, sums);
      LESA_UNROLL for (int row = 0; row < kTile; ++row) {
        LESA_UNROLL for (int half = 0; half < 2; ++half) {
          float* total = totals[row] + half * Vector::kLanes;
          Vector::template store<Float32>(total, Vector::add(sums[row][half], Vector::template load<Float32>(total)));
        }
      }
    }
    const int64_t n = std::min(kPanel, head.outputs - first);
    for (int row = 0; row < kTile; ++row) std::copy_n(totals[row], n, output + row * head.outputs + first);
  }
}

// What velocity_tiles needs for the features of the current tokens.
struct Workspace {
  float* differences;
  float* input;
  float* features;
  int64_t stride;
};

// The velocities of tokens [begin, end), kTile at a time while there are so many.
template <bool kPerChannel, int kTile>
LESA_KERNEL void velocity_tiles(const StreamForecast& p, const StreamHead& head, const Projection& projection,
                                const Sample& s, int64_t begin, int64_t end, const Workspace& at) {
  for (; begin + kTile <= end; begin += kTile) {
    if (s.matrices) {
      project<Float32, kTile>(p, s, begin, at.differences, at.input);
      finish<Float32, kPerChannel, kTile>(p, s, begin, at.input, at.features, at.stride);
    } else {
      for (int64_t row = 0; row < kTile; ++row) {
        mix<Float32, kPerChannel, 4>(p, s, begin + row, 0, p.dim, s.constants, at.features + row * at.stride);
      }
    }
    for (int64_t row = 0; row < kTile; ++row) {
      const float* shift = s.shift ? s.shift + (begin + row) * head.shift_token_stride : nullptr;
      const float* scale = s.scale + (begin + row) * head.scale_token_stride;
      modulate(p.dim, head.norm, head.eps, scale, shift, at.features + row * at.stride);
    }
    float* output = static_cast<float*>(s.output) + begin * head.outputs;
    apply_head<kTile>(p, head, projection, at.features, at.stride, output);
  }
  if constexpr (kTile > 1) {
    if (begin < end) velocity_tiles<kPerChannel, kTile / 2>(p, head, projection, s, begin, end, at);
  }
}

LESA_KERNEL void velocity(const StreamForecast& p, const StreamHead& head, const Projection& projection,
                          const Sample& s, int64_t begin, int64_t end) {
  if (s.anchors == 0) {
    auto* output = static_cast<float*>(s.output);
    std::fill(output + begin * head.outputs, output + end * head.outputs, Float32::kNan);
    return;
  }
  const int64_t inputs = s.matrices ? static_cast<int64_t>(s.matrices->inputs.size()) : 0;
  const int64_t differences = 2 * inputs * Vector::kRows * kGroup;
  const int64_t input = s.matrices ? Vector::kRows * s.matrices->padded_rank : 0;
  // The features of all tokens of a tile are read together, so they should not all have the same set of a cache.
  const int64_t line = kCacheLine / sizeof(float), stride = round_up(p.dim, line) + line;
  const AlignedFloats scratch(differences + input + Vector::kRows * stride);
  const Workspace at{scratch.begin(), scratch.begin() + differences, scratch.begin() + differences + input, stride};
  if (p.anchors_per_channel) {
    velocity_tiles<true, Vector::kRows>(p, head, projection, s, begin, end, at);
  } else {
    velocity_tiles<false, Vector::kRows>(p, head, projection, s, begin, end, at);
  }
}

constexpr Kernels kKernels{kPanel,
                           {pack<Float32>, pack<Float16>, pack<BFloat16>},
                           {forecast<Float32>, forecast<Float16>, forecast<BFloat16>},
                           {Vector::kStreams<Float32>, Vector::kStreams<Float16>, Vector::kStreams<BFloat16>},
                           pack_head,
                           velocity};
