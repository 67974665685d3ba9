// Products and attention in bfloat16, for x86-64 processors with AVX512_BF16.
//
// A weight [out, in] lies in panels of 64 rows, in each of which two neighbouring columns of all
// rows follow each other: [out / 64][in / 2][64][2]. So the instruction that multiplies pairs and
// adds them up in fp32 (vdpbf16ps) takes 16 rows of the weight at once, and a product reads the
// weight once, from its first byte to its last. Each number of a product is summed in the same
// order whatever is multiplied beside it: a row's result does not depend on its batch.
//
// Plain functions take addresses; those whose name begins with aoti_torch are how code that
// inductor made calls them. Threads are OpenMP's, of the same library as torch's: gcc's.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace {

using bf16 = uint16_t;

constexpr int64_t kPanel = 64;         // rows of a weight that lie together
constexpr int64_t kPair = 2 * kPanel;  // numbers of a panel for a pair of columns
constexpr int64_t kNear = 1536;        // numbers ahead that a panel is asked for where it is read once
constexpr int64_t kRows = 6;           // rows of a product that are held in registers at once

inline __m512bh pairs(const void* at) { return (__m512bh)_mm512_loadu_si512(at); }

inline __m512bh same_pair(const bf16* at) {
  int32_t pair;
  std::memcpy(&pair, at, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

inline __m512 widened(const bf16* at) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline void store_rounded(bf16* at, __m512 value) {
  _mm256_storeu_si256((__m256i*)at, (__m256i)_mm512_cvtneps_pbh(value));
}

// Room for so many numbers, which nobody sets: whoever reads them has written them.
template <typename T>
std::unique_ptr<T[]> room(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

inline float number(bf16 bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// -- a few rows times a panel ---------------------------------------------------------------------

// Adds x [R, 2 pairs] times a panel to sums [R, 64]. Meanwhile asks memory for so many lines of what
// comes later, for each pair.
template <int R, int kLines>
inline void multiply(const bf16* x, int64_t x_stride, const bf16* panel, int64_t count,
                     __m512 (&sums)[R][4], const bf16* later = nullptr) {
  for (int64_t k = 0; k < count; ++k) {
    const bf16* at = panel + k * kPair;
    for (int j = 0; j < kLines; ++j)
      _mm_prefetch((const char*)(later + 32 * (k * kLines + j)), _MM_HINT_T0);
    const __m512bh w[4] = {pairs(at), pairs(at + 32), pairs(at + 64), pairs(at + 96)};
    for (int r = 0; r < R; ++r) {
      const __m512bh x_pair = same_pair(x + r * x_stride + 2 * k);
      for (int j = 0; j < 4; ++j) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], x_pair, w[j]);
    }
  }
}

// Calls `block` with the number of rows as a constant: six at a time, then what is left.
template <typename Block>
inline void by_rows(int64_t rows, Block&& block) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) block(std::integral_constant<int, 6>(), row);
  switch (rows - row) {
    case 5: block(std::integral_constant<int, 5>(), row); break;
    case 4: block(std::integral_constant<int, 4>(), row); break;
    case 3: block(std::integral_constant<int, 3>(), row); break;
    case 2: block(std::integral_constant<int, 2>(), row); break;
    case 1: block(std::integral_constant<int, 1>(), row); break;
    default: break;
  }
}

struct Product {
  const bf16* x;     // [rows, in]
  const bf16* w;     // [panels, in / 2, 64, 2]
  const bf16* bias;  // [out], or null
  bf16* y;           // [rows, out]
  int64_t in, out;

  // y [first .. first + rows, the panel's 64 columns].
  void panel(int64_t number, int64_t first, int64_t rows) const {
    const bf16* at = w + number * kPanel * in;
    const int64_t column = number * kPanel, width = std::min(kPanel, out - column);
    __m512 begin[4];
    for (int j = 0; j < 4; ++j) begin[j] = _mm512_setzero_ps();
    if (bias) {
      bf16 padded[kPanel] = {};
      std::memcpy(padded, bias + column, width * sizeof(bf16));
      for (int j = 0; j < 4; ++j) begin[j] = widened(padded + 16 * j);
    }
    by_rows(rows, [&](auto count, int64_t row) {
      constexpr int R = decltype(count)::value;
      const bf16* from = x + (first + row) * in;
      __m512 sums[R][4];
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < 4; ++j) sums[r][j] = begin[j];
      // The next panel, a part of it with each six rows.
      const bf16* next = at + kPanel * in;
      if (rows <= kRows) {
        multiply<R, 4>(from, in, at, in / 2, sums, at + kNear);
      } else if (row < 3 * kRows && rows <= 3 * kRows) {
        multiply<R, 2>(from, in, at, in / 2, sums, next + row / kRows * in / 2 * 64);
      } else if (row < 4 * kRows) {
        multiply<R, 1>(from, in, at, in / 2, sums, next + row / kRows * in / 2 * 32);
      } else {
        multiply<R, 0>(from, in, at, in / 2, sums);
      }
      for (int r = 0; r < R; ++r) {
        bf16* to = y + (first + row + r) * out + column;
        bf16 last[kPanel];
        bf16* rounded = width == kPanel ? to : last;
        for (int j = 0; j < 4; ++j) store_rounded(rounded + 16 * j, sums[r][j]);
        if (rounded == last) std::memcpy(to, last, width * sizeof(bf16));
      }
    });
  }
};

// -- attention ------------------------------------------------------------------------------------

constexpr int64_t kFew = 8;           // tokens of a row up to which keys are read as they lie
constexpr int64_t kPart = 128;        // positions that are then read at a time
constexpr int64_t kLot = 48;          // tokens of a prompt that are read at a time, and
constexpr int64_t kBlock = 256;       // positions that they see at a time
constexpr float kUnseen = -1e30f;     // what a mask adds where nothing is to be seen, at most
constexpr float kLeast = -FLT_MAX;    // a score before any is known: finite, for masks of -inf

inline __m512 exponential(__m512 x) {
  // 2^n e^r with |r| <= ln(2) / 2, where a polynomial of degree 6 is exact to fp32's rounding.
  x = _mm512_max_ps(_mm512_set1_ps(-104.f), x);  // in this order: no number stays none
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.3981999507e-3f);
  for (float c : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.f, 1.f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// The sums of four registers' lanes: in each quarter of the result those of a quarter of them.
inline __m512 quarters(const __m512 (&v)[4]) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
}

inline __m512 halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// The sums of sixteen registers, in their order.
inline __m512 totals(const __m512 (&v)[4][4]) {
  return halves(halves(quarters(v[0]), quarters(v[1])), halves(quarters(v[2]), quarters(v[3])));
}

struct Attention {
  const bf16 *query, *key, *value, *mask;
  const bf16* sinks;  // [heads], or null
  bf16* out;          // [rows, tokens, heads, value_dim]
  int64_t rows, heads, kv_heads, tokens, read, dim, value_dim;
  int64_t query_strides[3], key_strides[3], value_strides[3];  // of row, head, token
  int64_t mask_row, mask_token;
  float scale, softcap;

  int64_t groups() const { return heads / kv_heads; }
  const bf16* query_at(int64_t row, int64_t head, int64_t token) const {
    return query + row * query_strides[0] + head * query_strides[1] + token * query_strides[2];
  }
  const bf16* key_at(int64_t row, int64_t head, int64_t position) const {
    return key + row * key_strides[0] + head * key_strides[1] + position * key_strides[2];
  }
  const bf16* value_at(int64_t row, int64_t head, int64_t position) const {
    return value + row * value_strides[0] + head * value_strides[1] + position * value_strides[2];
  }
  const bf16* mask_at(int64_t row, int64_t token) const {
    return mask + row * mask_row + token * mask_token;
  }

  // Positions from begin up to end that any of some tokens may see.
  void span(int64_t row, int64_t token, int64_t count, int64_t& begin, int64_t& end) const {
    begin = read, end = 0;
    for (int64_t t = token; t < token + count; ++t) {
      const bf16* seen = mask_at(row, t);
      int64_t first = 0, last = read;
      while (first < begin && number(seen[first]) < kUnseen) ++first;
      while (last > end && number(seen[last - 1]) < kUnseen) --last;
      begin = std::min(begin, first), end = std::max(end, last);
    }
    begin = std::min(begin, end);
  }

  // Scores [count] of sums of products: scaled, bent, masked. Returns the largest.
  float finish(float* scores, const bf16* masked, int64_t count) const {
    const __m512 factor = _mm512_set1_ps(scale), cap = _mm512_set1_ps(softcap);
    __m512 most = _mm512_set1_ps(kLeast);
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 here = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
      __m512 s = _mm512_mul_ps(_mm512_maskz_loadu_ps(here, scores + i), factor);
      if (softcap > 0) {  // tanh(x) = 1 - 2 / (e^2x + 1)
        const __m512 one = _mm512_set1_ps(1), two = _mm512_set1_ps(2);
        __m512 x = _mm512_mul_ps(two, _mm512_div_ps(s, cap));
        x = _mm512_min_ps(x, _mm512_set1_ps(80));
        const __m512 under = _mm512_add_ps(exponential(x), one);
        s = _mm512_mul_ps(cap, _mm512_sub_ps(one, _mm512_div_ps(two, under)));
      }
      const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, masked + i));
      s = _mm512_add_ps(s, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
      _mm512_mask_storeu_ps(scores + i, here, s);
      most = _mm512_mask_max_ps(most, here, most, s);
    }
    return _mm512_reduce_max_ps(most);
  }

  // e^(score - most) of some scores, rounded into `weights`; zeros up to `padded`. Their sum.
  static float exponentials(const float* scores, int64_t count, float most, bf16* weights,
                            int64_t padded) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < padded; i += 16) {
      const int64_t left = std::max<int64_t>(count - i, 0);
      const __mmask16 here = left >= 16 ? 0xffff : (1u << left) - 1;
      __m512 s = _mm512_maskz_loadu_ps(here, scores + i);
      s = _mm512_maskz_mov_ps(here, exponential(_mm512_sub_ps(s, _mm512_set1_ps(most))));
      total = _mm512_add_ps(total, s);
      store_rounded(weights + i, s);
    }
    return _mm512_reduce_add_ps(total);
  }

  // -- a few tokens per row: each row's positions in parts, which are joined at the end --

  struct Part {
    int64_t row, head, begin, end;
  };

  void few() const {
    const int64_t queries = groups() * tokens, joined = queries * (value_dim + 2);
    std::vector<Part> parts;
    std::vector<int64_t> first;  // part of each row and KV head
    for (int64_t row = 0; row < rows; ++row) {
      int64_t begin, end;
      span(row, 0, tokens, begin, end);
      for (int64_t head = 0; head < kv_heads; ++head) {
        first.push_back(parts.size());
        for (int64_t at = begin; at < end; at += kPart)
          parts.push_back({row, head, at, std::min(at + kPart, end)});
      }
    }
    first.push_back(parts.size());
    const auto found = room<float>(parts.size() * joined);
    const int64_t count = parts.size(), pieces = rows * kv_heads;
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; ++i)
        read_part(parts[i], parts[std::min(i + 1, count - 1)], found.get() + i * joined);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < pieces; ++i) {
        join(i / kv_heads, i % kv_heads, found.get() + first[i] * joined, first[i + 1] - first[i]);
      }
    }
  }

  static void ask(const bf16* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 32) _mm_prefetch((const char*)(row + i), _MM_HINT_T0);
  }

  // Of each query the largest score, the sum of the weights, and the sum of weighted values.
  // What the next part reads is asked for meanwhile, for the processor does not foresee it.
  void read_part(const Part& part, const Part& next, float* found) const {
    const int64_t queries = groups() * tokens, count = part.end - part.begin;
    alignas(64) float scores[4][kPart];
    alignas(64) bf16 weights[4][kPart];
    for (int64_t q = 0; q < queries; q += 4) {
      const int64_t some = std::min<int64_t>(4, queries - q);
      const bf16* asked[4];
      for (int64_t r = 0; r < 4; ++r) {
        const int64_t n = std::min(q + r, queries - 1);
        asked[r] = query_at(part.row, part.head * groups() + n / tokens, n % tokens);
      }
      for (int64_t at = 0; at < count; at += 4) {
        if (q == 0) {
          for (int64_t p = next.begin + at; p < std::min(next.begin + at + 4, next.end); ++p) {
            ask(key_at(next.row, next.head, p), dim);
            ask(value_at(next.row, next.head, p), value_dim);
          }
        }
        dots(part, at, count, asked, scores);
      }
      for (int64_t r = 0; r < some; ++r) {
        const bf16* masked = mask_at(part.row, (q + r) % tokens) + part.begin;
        float* here = found + (q + r) * (value_dim + 2);
        here[0] = finish(scores[r], masked, count);
        here[1] = exponentials(scores[r], count, here[0], weights[r], kPart);
      }
      for (int64_t r = some; r < 4; ++r) std::memset(weights[r], 0, sizeof weights[r]);
      for (int64_t d = 0; d < value_dim; d += 32)
        weigh(part, d, count, weights, found + q * (value_dim + 2) + 2 + d, some);
    }
  }

  // Scores of four queries at four positions.
  void dots(const Part& part, int64_t at, int64_t count, const bf16* const (&asked)[4],
            float (&scores)[4][kPart]) const {
    const bf16* keys[4];
    for (int64_t p = 0; p < 4; ++p)
      keys[p] = key_at(part.row, part.head, part.begin + std::min(at + p, count - 1));
    __m512 sums[4][4];
    for (int r = 0; r < 4; ++r)
      for (int p = 0; p < 4; ++p) sums[r][p] = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += 32) {
      const __mmask32 here = dim - d >= 32 ? ~0u : (1u << (dim - d)) - 1;
      __m512bh k[4];
      for (int p = 0; p < 4; ++p) k[p] = (__m512bh)_mm512_maskz_loadu_epi16(here, keys[p] + d);
      for (int r = 0; r < 4; ++r) {
        const __m512bh q = (__m512bh)_mm512_maskz_loadu_epi16(here, asked[r] + d);
        for (int p = 0; p < 4; ++p) sums[r][p] = _mm512_dpbf16_ps(sums[r][p], q, k[p]);
      }
    }
    const __m512 all = totals(sums);
    _mm_storeu_ps(&scores[0][at], _mm512_extractf32x4_ps(all, 0));
    _mm_storeu_ps(&scores[1][at], _mm512_extractf32x4_ps(all, 1));
    _mm_storeu_ps(&scores[2][at], _mm512_extractf32x4_ps(all, 2));
    _mm_storeu_ps(&scores[3][at], _mm512_extractf32x4_ps(all, 3));
  }

  // Weighted sums of 32 numbers of each value.
  void weigh(const Part& part, int64_t d, int64_t count, const bf16 (&weights)[4][kPart],
             float* found, int64_t some) const {
    const __mmask32 here = value_dim - d >= 32 ? ~0u : (1u << (value_dim - d)) - 1;
    __m512 low[4], high[4];
    for (int r = 0; r < 4; ++r) low[r] = high[r] = _mm512_setzero_ps();
    for (int64_t p = 0; p < count; p += 2) {
      const bf16* at = value_at(part.row, part.head, part.begin + p) + d;
      const __m512i one = _mm512_maskz_loadu_epi16(here, at);
      const __m512i other = p + 1 < count ? _mm512_maskz_loadu_epi16(here, at + value_strides[2])
                                          : _mm512_setzero_si512();
      const __m512bh a = (__m512bh)_mm512_unpacklo_epi16(one, other);
      const __m512bh b = (__m512bh)_mm512_unpackhi_epi16(one, other);
      for (int r = 0; r < 4; ++r) {
        const __m512bh w = same_pair(&weights[r][p]);
        low[r] = _mm512_dpbf16_ps(low[r], w, a);
        high[r] = _mm512_dpbf16_ps(high[r], w, b);
      }
    }
    // Unpacking took four numbers of each quarter of the register in turn.
    const __m512i firsts =
        _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i seconds =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int64_t r = 0; r < some; ++r) {
      float* to = found + r * (value_dim + 2);
      _mm512_mask_storeu_ps(to, (__mmask16)here, _mm512_permutex2var_ps(low[r], firsts, high[r]));
      _mm512_mask_storeu_ps(to + 16, (__mmask16)(here >> 16),
                            _mm512_permutex2var_ps(low[r], seconds, high[r]));
    }
  }

  // The result of the queries of one KV head, from that of its parts.
  void join(int64_t row, int64_t head, const float* found, int64_t parts) const {
    const int64_t queries = groups() * tokens, width = value_dim + 2;
    std::vector<float> sum(value_dim);
    for (int64_t q = 0; q < queries; ++q) {
      const int64_t which = head * groups() + q / tokens;
      float most = sinks ? number(sinks[which]) : kLeast;
      for (int64_t i = 0; i < parts; ++i) most = std::max(most, found[(i * queries + q) * width]);
      float total = sinks ? std::exp(number(sinks[which]) - most) : 0;
      std::fill(sum.begin(), sum.end(), 0.f);
      for (int64_t i = 0; i < parts; ++i) {
        const float* one = found + (i * queries + q) * width;
        const float share = std::exp(one[0] - most);
        total += share * one[1];
        for (int64_t d = 0; d < value_dim; ++d) sum[d] += share * one[2 + d];
      }
      write(row, q % tokens, which, sum.data(), total);
    }
  }

  // One query's result, divided by the sum of its weights; zeros where it saw nothing.
  void write(int64_t row, int64_t token, int64_t head, const float* sum, float total) const {
    bf16* to = out + ((row * tokens + token) * heads + head) * value_dim;
    const __m512 share = _mm512_set1_ps(total > 0 ? 1 / total : 0);
    for (int64_t d = 0; d < value_dim; d += 16) {
      const __mmask16 here = value_dim - d >= 16 ? 0xffff : (1u << (value_dim - d)) - 1;
      const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(here, sum + d), share);
      _mm256_mask_storeu_epi16(to + d, here, (__m256i)_mm512_cvtneps_pbh(value));
    }
  }

  // -- many tokens per row: keys and values in panels, lots of tokens against blocks of them --

  struct Panels {
    int64_t first, last;       // panels of positions that any token of the row may see
    int64_t positions, width;  // of all panels; numbers of a value, in whole panels
    std::unique_ptr<bf16[]> keys;    // [positions / 64, dim / 2, 64, 2]
    std::unique_ptr<bf16[]> values;  // [width / 64, positions / 2, 64, 2]

    bf16* value_at(int64_t panel, int64_t position) const {
      return values.get() + (panel * positions + position) * kPanel;
    }
  };

  void many() const {
    const int64_t lots = (tokens + kLot - 1) / kLot, pieces = groups() * lots;
    Panels panels{};
    panels.positions = (read + kPanel - 1) / kPanel * kPanel;
    panels.width = (value_dim + kPanel - 1) / kPanel * kPanel;
    panels.keys = room<bf16>(panels.positions * dim);
    panels.values = room<bf16>(panels.positions * panels.width);
    const auto sums = room<float>(omp_get_max_threads() * kLot * panels.width);
#pragma omp parallel
    for (int64_t row = 0; row < rows; ++row) {
#pragma omp single
      {
        int64_t begin, end;
        span(row, 0, tokens, begin, end);
        panels.first = begin / kPanel, panels.last = (end + kPanel - 1) / kPanel;
      }
      for (int64_t head = 0; head < kv_heads; ++head) {
#pragma omp for schedule(dynamic)
        for (int64_t panel = panels.first; panel < panels.last; ++panel)
          lay_out(row, head, panel * kPanel, panels);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < pieces; ++i) {
          // The last lots see most, and come first.
          const int64_t lot = lots - 1 - i / groups(), which = head * groups() + i % groups();
          float* here = sums.get() + omp_get_thread_num() * kLot * panels.width;
          read_lot(row, which, lot * kLot, panels, here);
        }
      }
    }
  }

  // The keys and values of a panel of positions. What is beyond the last position is never asked.
  void lay_out(int64_t row, int64_t head, int64_t begin, const Panels& panels) const {
    bf16* keys = panels.keys.get() + begin * dim;
    for (int64_t i = 0; i < kPanel; ++i) {
      const bf16* from = key_at(row, head, std::min(begin + i, read - 1));
      for (int64_t d = 0; d < dim; d += 2) std::memcpy(keys + d * kPanel + 2 * i, from + d, 4);
    }
    alignas(64) uint16_t turns[64];  // of two registers' numbers: one of each in turn
    for (int i = 0; i < 64; ++i) turns[i] = i / 2 + i % 2 * 32;
    const __m512i low = _mm512_load_si512(turns), high = _mm512_load_si512(turns + 32);
    for (int64_t p = begin; p < begin + kPanel; p += 2) {
      const bf16* one = value_at(row, head, std::min(p, read - 1));
      const bf16* other = value_at(row, head, std::min(p + 1, read - 1));
      for (int64_t d = 0; d < panels.width; d += 32) {
        const int64_t left = std::clamp<int64_t>(value_dim - d, 0, 32);
        const __mmask32 first = left == 32 ? ~0u : (1u << left) - 1;
        const __m512i a = _mm512_maskz_loadu_epi16(p < read ? first : 0, one + d);
        const __m512i b = _mm512_maskz_loadu_epi16(p + 1 < read ? first : 0, other + d);
        bf16* to = panels.value_at(d / kPanel, p) + d % kPanel * 2;
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(a, high, b));
      }
    }
  }

  void read_lot(int64_t row, int64_t head, int64_t token, const Panels& panels,
                float* sums) const {
    const int64_t count = std::min(kLot, tokens - token);
    alignas(64) float scores[kLot][kBlock];
    alignas(64) bf16 weights[kLot][kBlock];
    float most[kLot], total[kLot];
    for (int64_t t = 0; t < count; ++t) {
      most[t] = sinks ? number(sinks[head]) : kLeast;
      total[t] = sinks ? 1 : 0;
    }
    std::fill(sums, sums + count * panels.width, 0.f);
    int64_t begin, end;
    span(row, token, count, begin, end);
    for (int64_t from = begin / kPanel * kPanel; from < end; from += kBlock) {
      const int64_t seen = std::min(kBlock, end - from);
      for (int64_t p = 0; p < seen; p += kPanel) {
        const bf16* at = panels.keys.get() + (from + p) * dim;
        by_rows(count, [&](auto some, int64_t t) {
          constexpr int R = decltype(some)::value;
          __m512 s[R][4] = {};
          multiply<R, 0>(query_at(row, head, token + t), query_strides[2], at, dim / 2, s);
          for (int r = 0; r < R; ++r)
            for (int j = 0; j < 4; ++j) _mm512_storeu_ps(&scores[t + r][p + 16 * j], s[r][j]);
        });
      }
      float shrink[kLot];
      for (int64_t t = 0; t < count; ++t) {
        const float here = finish(scores[t], mask_at(row, token + t) + from, seen);
        const float now = std::max(most[t], here);
        shrink[t] = std::exp(most[t] - now);
        most[t] = now;
        total[t] = total[t] * shrink[t] + exponentials(scores[t], seen, now, weights[t], kBlock);
      }
      for (int64_t panel = 0; panel * kPanel < panels.width; ++panel) {
        const bf16* at = panels.value_at(panel, from);
        by_rows(count, [&](auto some, int64_t t) {
          constexpr int R = decltype(some)::value;
          __m512 s[R][4];
          float* to = sums + t * panels.width + panel * kPanel;
          for (int r = 0; r < R; ++r)
            for (int j = 0; j < 4; ++j)
              s[r][j] = _mm512_mul_ps(_mm512_loadu_ps(to + r * panels.width + 16 * j),
                                      _mm512_set1_ps(shrink[t + r]));
          multiply<R, 0>(weights[t], kBlock, at, (seen + 1) / 2, s);
          for (int r = 0; r < R; ++r)
            for (int j = 0; j < 4; ++j)
              _mm512_storeu_ps(to + r * panels.width + 16 * j, s[r][j]);
        });
      }
    }
    for (int64_t t = 0; t < count; ++t)
      write(row, token + t, head, sums + t * panels.width, total[t]);
  }
};

// -- tensors --------------------------------------------------------------------------------------

struct Tensor {
  int64_t dims = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  bf16* data = nullptr;

  explicit Tensor(AtenTensorHandle handle) {
    void* at = nullptr;
    aoti_torch_get_data_ptr(handle, &at);
    aoti_torch_get_dim(handle, &dims);
    aoti_torch_get_sizes(handle, &sizes);
    aoti_torch_get_strides(handle, &strides);
    data = static_cast<bf16*>(at);
  }

  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dims - 1; i >= 0; --i) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }
};

AOTITorchError empty(int64_t dims, const int64_t* sizes, AtenTensorHandle* made) {
  int64_t strides[8];
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) strides[i] = stride, stride *= sizes[i];
  return aoti_torch_empty_strided(dims, sizes, strides, aoti_torch_dtype_bfloat16(),
                                  aoti_torch_device_type_cpu(), 0, made);
}

}  // namespace

#define SEEN __attribute__((visibility("default")))

extern "C" {

// y [rows, out] = x [rows, in] times the transpose of a weight in panels, plus the bias if any.
SEEN void inferkit_linear(const bf16* x, const bf16* w, const bf16* bias, bf16* y, int64_t rows,
                     int64_t in, int64_t out) {
  const Product product{x, w, bias, y, in, out};
  const int64_t panels = (out + kPanel - 1) / kPanel;
  // All rows against a panel, which is read once; by lots of rows where panels are few for threads.
  const int64_t most = rows >= 512 ? 96 : rows, lots = most ? (rows + most - 1) / most : 0;
  const int64_t pieces = panels * lots, threads = omp_get_max_threads();
  // Neighbouring panels for each thread; many times some where there are enough.
  const int64_t shares = threads * std::clamp<int64_t>(pieces / (threads * 8), 1, 16);
  const int64_t share = std::max<int64_t>(1, (pieces + shares - 1) / shares);
#pragma omp parallel for schedule(dynamic, share)
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t first = i % lots * most;
    product.panel(i / lots, first, std::min(most, rows - first));
  }
}

// See Attention, which has these sizes in this order. False where memory was lacking.
SEEN bool inferkit_attend(const bf16* query, const bf16* key, const bf16* value, const bf16* mask,
                     const bf16* sinks, bf16* out, const int64_t* sizes, const int64_t* strides,
                     float scale, float softcap) {
  Attention a{};
  a.query = query, a.key = key, a.value = value, a.mask = mask, a.sinks = sinks, a.out = out;
  a.rows = sizes[0], a.heads = sizes[1], a.kv_heads = sizes[2], a.tokens = sizes[3];
  a.read = sizes[4], a.dim = sizes[5], a.value_dim = sizes[6];
  std::copy(strides, strides + 3, a.query_strides);
  std::copy(strides + 3, strides + 6, a.key_strides);
  std::copy(strides + 6, strides + 9, a.value_strides);
  a.mask_row = strides[9], a.mask_token = strides[10];
  a.scale = scale, a.softcap = softcap;
  try {
    if (a.tokens <= kFew) {
      a.few();
    } else {
      a.many();
    }
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

SEEN AOTITorchError aoti_torch_cpu_packed_linear(AtenTensorHandle x, AtenTensorHandle weight,
                                              AtenTensorHandle* bias, int64_t out_features,
                                              AtenTensorHandle* made) {
  const Tensor from(x), w(weight);
  if (!from.contiguous() || !w.contiguous() || from.dims > 8) return AOTI_TORCH_FAILURE;
  int64_t sizes[8], rows = 1;
  for (int64_t i = 0; i < from.dims; ++i) sizes[i] = from.sizes[i];
  for (int64_t i = 0; i + 1 < from.dims; ++i) rows *= sizes[i];
  const int64_t in = sizes[from.dims - 1];
  if (w.dims != 4 || in != 2 * w.sizes[1]) return AOTI_TORCH_FAILURE;
  sizes[from.dims - 1] = out_features;
  if (AOTITorchError error = empty(from.dims, sizes, made)) return error;
  inferkit_linear(from.data, w.data, bias ? Tensor(*bias).data : nullptr, Tensor(*made).data, rows,
                  in, out_features);
  return AOTI_TORCH_SUCCESS;
}

SEEN AOTITorchError aoti_torch_cpu_masked_attention(AtenTensorHandle query, AtenTensorHandle key,
                                              AtenTensorHandle value, AtenTensorHandle mask,
                                              double scale, double softcap, AtenTensorHandle* sinks,
                                              AtenTensorHandle* made) {
  const Tensor q(query), k(key), v(value), m(mask);
  for (const Tensor* t : {&q, &k, &v, &m})
    if (t->dims != 4 || t->strides[3] != 1) return AOTI_TORCH_FAILURE;
  const int64_t out[] = {q.sizes[0], q.sizes[2], q.sizes[1], v.sizes[3]};
  if (AOTITorchError error = empty(4, out, made)) return error;
  const int64_t sizes[] = {q.sizes[0], q.sizes[1], k.sizes[1], q.sizes[2],
                           k.sizes[2], q.sizes[3], v.sizes[3]};
  const int64_t strides[] = {q.strides[0], q.strides[1], q.strides[2], k.strides[0],
                             k.strides[1], k.strides[2], v.strides[0], v.strides[1],
                             v.strides[2], m.strides[0], m.strides[2]};
  const bool done = inferkit_attend(q.data, k.data, v.data, m.data,
                                    sinks ? Tensor(*sinks).data : nullptr, Tensor(*made).data, sizes,
                                    strides, static_cast<float>(scale), static_cast<float>(softcap));
  return done ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

}  // extern "C"
