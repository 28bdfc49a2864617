// The inner loops of newton_predict_cpu.cpp, which includes this once for each instruction set: in a namespace where
// `Vector` holds its operations and LESA_KERNEL lets a function use them. Compilers inline no function into one that
// may use fewer instructions, so a template over the instruction set can't do this.

constexpr int64_t kPanel = 2 * Vector::kLanes;  // columns of a block of a matrix product that stays in registers
constexpr int64_t kRows = 6;                    // rows of it
constexpr int64_t kBlock = 512;                 // channels whose projections stay in the second-level cache
constexpr int64_t kGroup = 64;                  // channels that are prepared together

LESA_INLINE LESA_KERNEL float dot(const float* a, const float* b, int64_t n) {
  typename Vector::Register sums[2] = {Vector::broadcast(0.0f), Vector::broadcast(0.0f)};
  int64_t i = 0;
  for (; i + kPanel <= n; i += kPanel) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i + half * Vector::kLanes;
      sums[half] = Vector::multiply_add(Vector::load<Float32>(a + at), Vector::load<Float32>(b + at), sums[half]);
    }
  }
  float lanes[kPanel];
  Vector::store<Float32>(lanes, sums[0]);
  Vector::store<Float32>(lanes + Vector::kLanes, sums[1]);
  for (int64_t width = kPanel / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  for (; i < n; ++i) lanes[0] = Vector::multiply_add(a[i], b[i], lanes[0]);
  return lanes[0];
}

// Prepares what all tokens of a sample share, for the channels [begin, end) of one group: the weights of the anchors
// and, with a residual, its matrices in the order in which they are read.
LESA_KERNEL void prepare_group(const NewtonPredict& p, const Sample& s, int64_t begin, int64_t end) {
  const int64_t n = end - begin;
  const int64_t longest = p.longest_history() - 1;  // taps of the stage with the most
  float row[kGroup];
  for (int64_t k = 0; k < s.anchors; ++k) std::fill_n(s.weights + k * s.padded_dim + begin, n, 0.0f);
  for (int64_t j = 0; j < s.taps; ++j) {
    const int64_t first = (s.stage * longest + j) * p.dim + begin;
    for (int64_t i = 0; i < n; ++i) {
      row[i] = dot(p.out_weight + (first + i) * p.hidden, s.hidden.data(), p.hidden) + p.out_bias[first + i];
    }
    for (int64_t k = 0; k < s.anchors; ++k) {
      float* weights = s.weights + k * s.padded_dim + begin;
      const float newton = s.newton[j * s.anchors + k];
      for (int64_t i = 0; i < n; ++i) weights[i] = Vector::multiply_add(row[i], newton, weights[i]);
    }
  }
  if (p.rank == 0) return;

  for (int64_t r = 0; r < p.rank; ++r) {
    for (int64_t k = 1; k < s.anchors; ++k) {
      std::fill_n(row, n, 0.0f);
      for (int64_t j = 0; j < s.taps; ++j) {
        const float* down = p.down + ((s.stage * p.rank + r) * longest + j) * p.dim + begin;
        const float newton = s.newton[j * s.anchors + k];
        for (int64_t i = 0; i < n; ++i) row[i] = Vector::multiply_add(down[i], newton, row[i]);
      }
      float* column = s.projections + ((k - 1) * p.dim + begin) * s.padded_rank + r;
      for (int64_t i = 0; i < n; ++i) column[i * s.padded_rank] = row[i];
    }
  }
  for (int64_t k = 1; k < s.anchors; ++k) {
    for (int64_t i = 0; i < n; ++i) {
      float* padding = s.projections + ((k - 1) * p.dim + begin + i) * s.padded_rank + p.rank;
      std::fill_n(padding, s.padded_rank - p.rank, 0.0f);
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t channel = begin + i;
    float* panel = s.up + channel / kPanel * kPanel * (p.rank + 1) + channel % kPanel;
    const float* up = p.up + (s.stage * p.dim + channel) * p.rank;
    panel[0] = p.up_bias[s.stage * p.dim + channel];
    for (int64_t r = 0; r < p.rank; ++r) panel[(r + 1) * kPanel] = up[r];
  }
}

LESA_KERNEL void prepare(const NewtonPredict& p, const Sample& s, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kGroup) prepare_group(p, s, first, std::min(first + kGroup, end));
}

template <class Element>
LESA_INLINE LESA_KERNEL const typename Element::Bits* anchor(const NewtonPredict& p, const Sample& s, int64_t k,
                                                             int64_t token) {
  return static_cast<const typename Element::Bits*>(s.features[k]) + token * p.token_stride;
}

// The newest feature plus the weighted sum of all.
template <class Element>
LESA_INLINE LESA_KERNEL float mix_one(const NewtonPredict& p, const Sample& s, int64_t token, int64_t d) {
  float sum = Element::load(anchor<Element>(p, s, 0, token)[d]);
  for (int64_t k = 0; k < s.anchors; ++k) {
    const float feature = Element::load(anchor<Element>(p, s, k, token)[d]);
    sum = Vector::multiply_add(s.weights[k * s.padded_dim + d], feature, sum);
  }
  return sum;
}

template <class Element, int kVectors>
LESA_INLINE LESA_KERNEL void mix(const NewtonPredict& p, const Sample& s, int64_t token, int64_t d,
                                 typename Vector::Register (&sums)[kVectors]) {
  const auto* newest = anchor<Element>(p, s, 0, token) + d;
  for (int v = 0; v < kVectors; ++v) sums[v] = Vector::load<Element>(newest + v * Vector::kLanes);
  for (int64_t k = 0; k < s.anchors; ++k) {
    const auto* feature = anchor<Element>(p, s, k, token) + d;
    const float* weights = s.weights + k * s.padded_dim + d;
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = Vector::multiply_add(Vector::load<Float32>(weights + v * Vector::kLanes),
                                     Vector::load<Element>(feature + v * Vector::kLanes), sums[v]);
    }
  }
}

template <class Element>
LESA_KERNEL void forecast_plain(const NewtonPredict& p, const Sample& s, int64_t token,
                                typename Element::Bits* output) {
  constexpr int kVectors = 4;
  int64_t d = 0;
  for (; d + kVectors * Vector::kLanes <= p.dim; d += kVectors * Vector::kLanes) {
    typename Vector::Register sums[kVectors];
    mix<Element>(p, s, token, d, sums);
    for (int v = 0; v < kVectors; ++v) Vector::store<Element>(output + d + v * Vector::kLanes, sums[v]);
  }
  for (; d < p.dim; ++d) output[d] = Element::store(mix_one<Element>(p, s, token, d));
}

// The difference between an anchor and the newest one: [rows, kBlock].
template <class Element>
LESA_KERNEL void subtract_newest(const NewtonPredict& p, const Sample& s, int64_t k, int64_t token, int64_t rows,
                                 int64_t first, int64_t n, float* differences) {
  for (int64_t row = 0; row < rows; ++row) {
    const auto* newest = anchor<Element>(p, s, 0, token + row) + first;
    const auto* feature = anchor<Element>(p, s, k, token + row) + first;
    float* target = differences + row * kBlock;
    int64_t d = 0;
    for (; d + Vector::kLanes <= n; d += Vector::kLanes) {
      const auto difference = Vector::subtract(Vector::load<Element>(feature + d), Vector::load<Element>(newest + d));
      Vector::store<Float32>(target + d, difference);
    }
    for (; d < n; ++d) target[d] = Element::load(feature[d]) - Element::load(newest[d]);
  }
}

// sums[kTile, kPanel] += a[kTile, depth] @ b[depth, kPanel]
template <int kTile>
LESA_INLINE LESA_KERNEL void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                                      typename Vector::Register (&sums)[kTile][2]) {
  for (int64_t i = 0; i < depth; ++i) {
    const auto left = Vector::load<Float32>(b + i * b_stride);
    const auto right = Vector::load<Float32>(b + i * b_stride + Vector::kLanes);
    for (int row = 0; row < kTile; ++row) {
      const auto value = Vector::broadcast(a[row * a_stride + i]);
      sums[row][0] = Vector::multiply_add(value, left, sums[row][0]);
      sums[row][1] = Vector::multiply_add(value, right, sums[row][1]);
    }
  }
}

// Adds the part of `n` channels of one anchor to the residual's input: [rows, padded_rank]. `rows` is at most kRows.
// Meanwhile the next features are fetched, for which the products would otherwise wait.
template <int kTile = kRows>
LESA_KERNEL void project(const Sample& s, const float* differences, const float* projection, int64_t n, int64_t rows,
                         const Ahead& ahead, float* input) {
  if constexpr (kTile > 1) {
    if (rows < kTile) return project<kTile - 1>(s, differences, projection, n, rows, ahead, input);
  }
  for (int64_t r = 0; r < s.padded_rank; r += kPanel) {
    typename Vector::Register sums[kTile][2];
    for (int row = 0; row < kTile; ++row) {
      sums[row][0] = Vector::load<Float32>(input + row * s.padded_rank + r);
      sums[row][1] = Vector::load<Float32>(input + row * s.padded_rank + r + Vector::kLanes);
    }
    for (int64_t i = 0; i < n; i += kGroup) {
      const int64_t depth = std::min(kGroup, n - i);
      if (r == 0) ahead.fetch(i, depth);
      multiply<kTile>(differences + i, kBlock, projection + i * s.padded_rank + r, s.padded_rank, depth, sums);
    }
    for (int row = 0; row < kTile; ++row) {
      Vector::store<Float32>(input + row * s.padded_rank + r, sums[row][0]);
      Vector::store<Float32>(input + row * s.padded_rank + r + Vector::kLanes, sums[row][1]);
    }
  }
}

// The forecast with its residual, from the residual's input.
template <class Element, int kTile = kRows>
LESA_KERNEL void forecast_with_residual(const NewtonPredict& p, const Sample& s, int64_t token, int64_t rows,
                                        const float* input, typename Element::Bits* output) {
  if constexpr (kTile > 1) {
    if (rows < kTile) return forecast_with_residual<Element, kTile - 1>(p, s, token, rows, input, output);
  }
  for (int64_t d = 0; d < p.dim; d += kPanel) {
    const float* panel = s.up + d * (p.rank + 1);
    typename Vector::Register sums[kTile][2];
    for (int row = 0; row < kTile; ++row) {
      sums[row][0] = Vector::load<Float32>(panel);
      sums[row][1] = Vector::load<Float32>(panel + Vector::kLanes);
    }
    multiply<kTile>(input, s.padded_rank, panel + kPanel, kPanel, p.rank, sums);
    for (int row = 0; row < kTile; ++row) {
      auto* target = output + row * p.dim + d;
      if (d + kPanel <= p.dim) {
        typename Vector::Register mixed[2];
        mix<Element>(p, s, token + row, d, mixed);
        Vector::store<Element>(target, Vector::add(mixed[0], sums[row][0]));
        Vector::store<Element>(target + Vector::kLanes, Vector::add(mixed[1], sums[row][1]));
      } else {
        float residual[kPanel];
        Vector::store<Float32>(residual, sums[row][0]);
        Vector::store<Float32>(residual + Vector::kLanes, sums[row][1]);
        for (int64_t i = 0; i < p.dim - d; ++i) {
          target[i] = Element::store(mix_one<Element>(p, s, token + row, d + i) + residual[i]);
        }
      }
    }
  }
}

template <class Element>
LESA_KERNEL void forecast(const NewtonPredict& p, const Sample& s, int64_t begin, int64_t end) {
  auto* output = static_cast<typename Element::Bits*>(s.output);
  if (s.anchors == 0) {
    std::fill(output + begin * p.dim, output + end * p.dim, Element::store(std::numeric_limits<float>::quiet_NaN()));
    return;
  }
  if (p.rank == 0) {
    for (int64_t token = begin; token < end; ++token) forecast_plain<Element>(p, s, token, output + token * p.dim);
    return;
  }
  constexpr int64_t item = sizeof(typename Element::Bits);
  float differences[kRows * kBlock];
  std::fill(s.residual + begin * s.padded_rank, s.residual + end * s.padded_rank, 0.0f);
  for (int64_t first = 0; first < p.dim; first += kBlock) {
    const int64_t channels = std::min(kBlock, p.dim - first);
    for (int64_t token = begin; token < end; token += kRows) {
      const int64_t rows = std::min(kRows, end - token);
      // The next tokens of these channels; after the last tokens, the first ones of the next channels.
      const bool wraps = token + rows == end;
      const int64_t next_token = wraps ? begin : token + rows;
      const int64_t next_first = wraps ? first + channels : first;
      const int64_t next_rows = next_first < p.dim ? std::min(kRows, end - next_token) : 0;
      for (int64_t k = 1; k < s.anchors; ++k) {
        const Ahead ahead{anchor<Element>(p, s, k, next_token) + next_first,
                          k == 1 ? anchor<Element>(p, s, 0, next_token) + next_first : nullptr, next_rows,
                          p.token_stride * item, item};
        subtract_newest<Element>(p, s, k, token, rows, first, channels, differences);
        const float* projection = s.projections + ((k - 1) * p.dim + first) * s.padded_rank;
        project(s, differences, projection, channels, rows, ahead, s.residual + token * s.padded_rank);
      }
    }
  }
  for (int64_t token = begin; token < end; token += kRows) {
    const int64_t rows = std::min(kRows, end - token);
    forecast_with_residual<Element>(p, s, token, rows, s.residual + token * s.padded_rank, output + token * p.dim);
  }
}

constexpr Kernels kKernels{kPanel, prepare, forecast<Float32>, forecast<Float16>, forecast<BFloat16>};
