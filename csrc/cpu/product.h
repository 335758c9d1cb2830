// Products of 16-bit hidden states with a 16-bit head, summed in float32, whatever instruction multiplies.
//
// A head is read where it lies and as it lies, once: what is rearranged is the hidden states, of which there are few.
// Lanes go along their rows, a word of the head is every lane's, and a block of columns is turned when it is put down.
//
// Multiply is an instruction: a lane takes DEPTH products at a time, of a word that pack() makes of DEPTH elements of
// its row (pack_last() of those that are left), and a word of the head's that all lanes share.
#pragma once

#include "rows.h"

DAM_BEGIN

constexpr int64_t GRAB = 256;   // columns of the result that a thread takes at a time
constexpr int TURN = 16;        // columns that are turned together
constexpr int SIDE = 4;         // columns that are summed side by side
constexpr int64_t STAYS = 128;  // words of rows that stay in the first cache while TURN columns pass by
constexpr int FEW = 4;          // rows up to which lanes go along the depth instead

// Vectors of rows that are summed side by side, as many as there are registers for.
constexpr int WIDEST = REGISTERS == 32 ? 4 : 2;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Element>
inline const Element* matrix_row(const Matrix& matrix, int64_t row) {
  return static_cast<const Element*>(matrix.data) + row * matrix.row_stride;
}

template <class Multiply>
constexpr int64_t words_of(int64_t depth) {
  return (depth + Multiply::DEPTH - 1) / Multiply::DEPTH;
}

// A word in every lane, whatever number its bits would be.
inline f32 everywhere(float word) { return bit_cast<f32>(u32{} + bit_cast<uint32_t>(word)); }

// Rows from `first` on, word after word of all of them side by side; zeros for rows that there are not.
template <class Multiply>
inline void rearrange(const ProductArgs& a, int64_t first, int width, float* out) {
  for (int t = 0; t < width; ++t) {
    const bool there = first + t < a.shape.rows;
    const auto* x = matrix_row<typename Multiply::Element>(a.hidden, there ? first + t : 0);
    for (int64_t d = 0; d < words_of<Multiply>(a.depth); ++d) {
      const int64_t at = d * Multiply::DEPTH;
      const float word = at + Multiply::DEPTH <= a.depth ? Multiply::pack(x + at) : Multiply::pack_last(x + at);
      out[d * width + t] = there ? word : 0.0f;
    }
  }
}

// Adds what `words` words contribute to sums [COLUMNS][VECTORS * LANES] of as many columns.
template <class Multiply, int VECTORS, int COLUMNS>
inline void add_words(const ProductArgs& a, const float* rows, int64_t from, int64_t words, int64_t column,
                      float* sums) {
  const typename Multiply::Element* w[COLUMNS];
  for (int v = 0; v < COLUMNS; ++v) w[v] = matrix_row<typename Multiply::Element>(a.weight, column + v);
  f32 sum[COLUMNS][VECTORS];
  for (int v = 0; v < COLUMNS; ++v) {
    for (int i = 0; i < VECTORS; ++i) sum[v][i] = load<f32>(sums + (v * VECTORS + i) * LANES);
  }
  const auto add = [&](int64_t d, auto pack) __attribute__((always_inline)) {
    f32 lanes[VECTORS];
    for (int i = 0; i < VECTORS; ++i) lanes[i] = load<f32>(rows + (d * VECTORS + i) * LANES);
    for (int v = 0; v < COLUMNS; ++v) {
      const f32 shared = everywhere(pack(w[v] + d * Multiply::DEPTH));
      for (int i = 0; i < VECTORS; ++i) sum[v][i] = Multiply::add(sum[v][i], lanes[i], shared);
    }
  };
  const int64_t whole = smaller(from + words, a.depth / Multiply::DEPTH);
  for (int64_t d = from; d < whole; ++d) add(d, [](const auto* x) { return Multiply::pack(x); });
  for (int64_t d = whole; d < from + words; ++d) add(d, [](const auto* x) { return Multiply::pack_last(x); });
  for (int v = 0; v < COLUMNS; ++v) {
    for (int i = 0; i < VECTORS; ++i) store(sums + (v * VECTORS + i) * LANES, sum[v][i]);
  }
}

// Some columns of the rows from `first` on, which were rearranged.
template <class Multiply, int VECTORS>
inline void fill_columns(const ProductArgs& a, const float* rows, int64_t first, int64_t begin, int64_t end) {
  constexpr int WIDTH = VECTORS * LANES;
  const int64_t count = smaller(WIDTH, a.shape.rows - first), words = words_of<Multiply>(a.depth);
  alignas(64) float sums[TURN * WIDTH];
  for (int64_t v = begin; v < end; v += TURN) {
    const int64_t columns = smaller(TURN, end - v);
    for (int i = 0; i < TURN * WIDTH; i += LANES) store(sums + i, f32{});
    for (int64_t d = 0; d < words; d += STAYS) {
      const int64_t some = smaller(STAYS, words - d);
      int64_t i = 0;
      for (; i + SIDE <= columns; i += SIDE) {
        add_words<Multiply, VECTORS, SIDE>(a, rows, d, some, v + i, sums + i * WIDTH);
      }
      for (; i < columns; ++i) add_words<Multiply, VECTORS, 1>(a, rows, d, some, v + i, sums + i * WIDTH);
    }
    for (int64_t t = 0; t < count; ++t) {
      float* const result = a.result + (first + t) * a.result_stride + v;
      for (int64_t i = 0; i < columns; ++i) result[i] = sums[i * WIDTH + t];
    }
  }
}

// Some columns of ROWS rows, with lanes along the depth.
template <class Multiply, int ROWS>
inline void fill_few(const ProductArgs& a, int64_t begin, int64_t end) {
  using Element = typename Multiply::Element;
  constexpr int COLUMNS = 8 / ROWS;  // sums side by side hide how long an addition takes
  constexpr int64_t STEP_ALONG = Multiply::DEPTH * LANES;
  for (int64_t v = begin; v < end; v += COLUMNS) {
    const Element* w[COLUMNS];
    for (int i = 0; i < COLUMNS; ++i) w[i] = matrix_row<Element>(a.weight, smaller(v + i, end - 1));
    f32 sum[COLUMNS][ROWS] = {};
    int64_t at = 0;
    for (; at + STEP_ALONG <= a.depth; at += STEP_ALONG) {
      for (int i = 0; i < COLUMNS; ++i) {
        const f32 along = Multiply::along(w[i] + at);
        for (int t = 0; t < ROWS; ++t) {
          sum[i][t] = Multiply::add(sum[i][t], Multiply::along(matrix_row<Element>(a.hidden, t) + at), along);
        }
      }
    }
    for (int i = 0; i < COLUMNS && v + i < end; ++i) {
      for (int t = 0; t < ROWS; ++t) {
        const Element* x = matrix_row<Element>(a.hidden, t);
        float total = fold(sum[i][t], [](auto b, auto c) { return b + c; });
        for (int64_t d = at; d < a.depth; ++d) total += load_one(x + d) * load_one(w[i] + d);
        a.result[t * a.result_stride + v + i] = total;
      }
    }
  }
}

template <class Multiply>
inline void multiply(const ProductArgs& a) {
  constexpr int WIDTH = WIDEST * LANES;
  const int64_t rows = a.shape.rows, words = words_of<Multiply>(a.depth);
  if (rows > FEW) {
    for (int64_t t = 0; t < rows; t += WIDTH) {
      const int width = static_cast<int>(smaller(WIDTH, (rows - t + LANES - 1) / LANES * LANES));
      rearrange<Multiply>(a, t, width, a.scratch + t * words);
    }
  }
  parallel_for((a.shape.columns + GRAB - 1) / GRAB, a.shape.threads, 1, [&](int64_t grab, int) {
    const int64_t begin = grab * GRAB, end = smaller(begin + GRAB, a.shape.columns);
    if (rows == 1) return fill_few<Multiply, 1>(a, begin, end);
    if (rows == 2) return fill_few<Multiply, 2>(a, begin, end);
    if (rows == 3) return fill_few<Multiply, 3>(a, begin, end);
    if (rows == 4) return fill_few<Multiply, 4>(a, begin, end);
    for (int64_t t = 0; t < rows; t += WIDTH) {
      const float* x = a.scratch + t * words;
      const int64_t vectors = smaller(WIDEST, (rows - t + LANES - 1) / LANES);
      if (vectors == 1) fill_columns<Multiply, 1>(a, x, t, begin, end);
      if (vectors == 2) fill_columns<Multiply, 2>(a, x, t, begin, end);
      if constexpr (WIDEST == 4) {
        if (vectors == 3) fill_columns<Multiply, 3>(a, x, t, begin, end);
        if (vectors == 4) fill_columns<Multiply, 4>(a, x, t, begin, end);
      }
    }
  });
}

DAM_END
