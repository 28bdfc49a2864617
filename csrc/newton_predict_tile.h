// The inner loops of newton_predict_cpu.cpp; see vectors.h.

// The values of the experts' outputs for kLanes adjacent channels, of which `n` exist.
LESA_KERNEL typename Vector::Register outputs(const float* weight, const float* hidden, int64_t width, int64_t n) {
  constexpr int64_t lanes = Vector::kLanes;
  typename Vector::Register sums[lanes];
  for (int64_t i = 0; i < lanes; ++i) {
    sums[i] = Vector::broadcast(0.0f);
    if (i >= n) continue;
    const float* row = weight + i * width;
    int64_t at = 0;
    for (; at + lanes <= width; at += lanes) {
      const auto values = Vector::template load<Float32>(row + at);
      sums[i] = Vector::multiply_add(values, Vector::template load<Float32>(hidden + at), sums[i]);
    }
    if (at == width) continue;
    float rest[2][lanes] = {};
    std::copy_n(row + at, width - at, rest[0]);
    std::copy_n(hidden + at, width - at, rest[1]);
    sums[i] = Vector::multiply_add(Vector::template load<Float32>(rest[0]), Vector::template load<Float32>(rest[1]),
                                   sums[i]);
  }
  Vector::transpose(sums);
  for (int64_t half = lanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sums[i] = Vector::add(sums[i], sums[i + half]);
  }
  return sums[0];
}

// The weights of the anchors for the channels [begin, end) of one forecast.
LESA_KERNEL void weigh_anchors(const NewtonCoefficients& c, const Row& row, int64_t begin, int64_t end) {
  const NewtonExperts& e = c.experts;
  const int64_t longest = e.longest_history();
  for (int64_t d = begin; d < end; d += Vector::kLanes) {
    const int64_t n = std::min<int64_t>(Vector::kLanes, e.dim - d);
    float sums[Vector::kLanes];
    for (int64_t k = 0; k < longest; ++k) std::fill_n(row.anchors + k * e.dim + d, n, k == 0 ? 1.0f : 0.0f);
    for (int64_t j = 0; j < row.taps; ++j) {
      const int64_t first = (row.stage * (longest - 1) + j) * e.dim + d;
      Vector::template store<Float32>(sums, outputs(e.out_weight + first * e.hidden, row.hidden.data(), e.hidden, n));
      for (int64_t i = 0; i < n; ++i) sums[i] += e.out_bias[first + i];
      for (int64_t k = 0; k < row.count; ++k) {
        float* weights = row.anchors + k * e.dim + d;
        const float newton = row.newton[j * longest + k];
        for (int64_t i = 0; i < n; ++i) weights[i] = Vector::multiply_add(sums[i], newton, weights[i]);
      }
    }
  }
}
