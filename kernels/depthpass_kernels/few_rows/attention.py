"""Attention of a few queries over a static cache: reads the columns that are seen, once each, and no others."""

ARGUMENTS = ("const T*", "const T*", "const T*", "const bool*", "T*", *("int64_t",) * 7, "float", "int64_t")
SOURCE = """
using Half = at::vec::Vectorized<T>;
using Wide = at::vec::Vectorized<float>;
constexpr int STEP = Half::size();

extern "C" void kernel(const T* q, const T* k, const T* v, const bool* seen, T* y,
                       int64_t batch, int64_t heads, int64_t queries, int64_t columns, int64_t dim, int64_t width,
                       int64_t masks, float scale, int64_t threads) {
  #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t head = 0; head < batch * heads; head++) {
    const bool* see = seen + (masks > 1 ? head / heads * columns : 0);
    const T* keys = k + head * columns * dim;
    const T* values = v + head * columns * width;
    std::vector<float> wide(queries * dim), logits(queries * columns), sums(queries * width, 0.f);
    for (int64_t i = 0; i < queries * dim; i++) wide[i] = static_cast<float>(q[head * queries * dim + i]) * scale;
    std::vector<float> most(queries, -std::numeric_limits<float>::infinity()), whole(queries, 0.f);
    for (int64_t n = 0; n < columns; n++) {
      if (!see[n]) continue;
      for (int64_t c = 0; c < queries; c++) {
        const float* a = wide.data() + c * dim;
        Wide first(0), second(0);
        int64_t d = 0;
        for (; d + STEP <= dim; d += STEP) {
          auto [low, high] = at::vec::convert_to_float<T>(Half::loadu(keys + n * dim + d));
          first = at::vec::fmadd(low, Wide::loadu(a + d), first);
          second = at::vec::fmadd(high, Wide::loadu(a + d + STEP / 2), second);
        }
        float logit = at::vec::vec_reduce_all<float>([](Wide x, Wide z) { return x + z; }, first + second);
        for (; d < dim; d++) logit += static_cast<float>(keys[n * dim + d]) * a[d];
        logits[c * columns + n] = logit;
        most[c] = std::max(most[c], logit);
      }
    }
    for (int64_t n = 0; n < columns; n++) {
      if (!see[n]) continue;
      for (int64_t c = 0; c < queries; c++) {
        float share = std::exp(logits[c * columns + n] - most[c]);
        whole[c] += share;
        float* out = sums.data() + c * width;
        int64_t d = 0;
        for (; d + STEP <= width; d += STEP) {
          auto [low, high] = at::vec::convert_to_float<T>(Half::loadu(values + n * width + d));
          at::vec::fmadd(low, Wide(share), Wide::loadu(out + d)).store(out + d);
          at::vec::fmadd(high, Wide(share), Wide::loadu(out + d + STEP / 2)).store(out + d + STEP / 2);
        }
        for (; d < width; d++) out[d] += share * static_cast<float>(values[n * width + d]);
      }
    }
    for (int64_t c = 0; c < queries; c++)
      for (int64_t d = 0; d < width; d++)
        y[(head * queries + c) * width + d] = static_cast<T>(sums[c * width + d] / whole[c]);
  }
}
"""
