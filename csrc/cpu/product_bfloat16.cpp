// product of bfloat16 by the instructions that multiply it: dot products of pairs (AVX-512 BF16), and tiles (AMX).
#include <sys/syscall.h>
#include <unistd.h>

#include "product.h"

DAM_BEGIN

struct Pairs {
  using Element = bfloat16;
  static constexpr int DEPTH = 2;
  static float pack(const Element* x) { return load<float>(x); }
  static float pack_last(const Element* x) { return bit_cast<float>(uint32_t{x->bits}); }
  static f32 along(const Element* x) { return load<f32>(x); }
  static f32 add(f32 sum, f32 a, f32 b) {
    return (f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  }
};

void multiply_pairs(const ProductArgs& a) { multiply<Pairs>(a); }

// ---- Tiles: 16 rows of 64 bytes. A head's is 16 of its rows by 32 of its columns as they lie; one of hidden states is
// 16 words of 16 rows, rearranged as above; a result's is turned.

constexpr int SIDES = 16, ALONG = 32, TILE_FLOATS = 256;
constexpr int64_t PASSING = 2 * SIDES;  // columns, and rows, of the four tiles that are summed side by side
constexpr int64_t RESIDENT = 1 << 20;   // bytes of rows that stay in a core's second cache while columns pass by

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

static void configure_tiles() {
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 64, shapes.rows[i] = SIDES;
  _tile_loadconfig(&shapes);
}

// Between two rows whose numbers differ by APART, the lanes that turning 16 rows into columns exchanges.
template <int APART>
static void exchange(__m512* rows) {
  const u32 lane = iota<u32>(), moves = lane & APART;
  const u32 upper = moves != 0u ? lane + (16 - APART) : lane, lower = moves != 0u ? lane + 16 : lane + APART;
  for (int i = 0; i < 16; ++i) {
    if (i & APART) continue;
    const __m512 a = rows[i], b = rows[i + APART];
    rows[i] = _mm512_permutex2var_ps(a, (__m512i)upper, b);
    rows[i + APART] = _mm512_permutex2var_ps(a, (__m512i)lower, b);
  }
}

static void turn_lines(__m512* lines) {
  exchange<8>(lines);
  exchange<4>(lines);
  exchange<2>(lines);
  exchange<1>(lines);
}

// Stores a tile [column][row] as rows of a result of up to `columns` columns. Past the caches whole lines need not be
// read before they are written; what reads a large result finds none of it in them anyway.
static void turn(const float* tile, float* result, int64_t stride, int64_t rows, int64_t columns, bool past_caches) {
  __m512 lines[16];
  for (int i = 0; i < 16; ++i) lines[i] = _mm512_load_ps(tile + 16 * i);
  turn_lines(lines);
  if (past_caches && columns == SIDES && reinterpret_cast<uintptr_t>(result) % 64 == 0 && stride % SIDES == 0) {
    for (int64_t t = 0; t < rows; ++t) _mm512_stream_ps(result + t * stride, lines[t]);
    return;
  }
  const __mmask16 mask = static_cast<__mmask16>((1u << columns) - 1);
  for (int64_t t = 0; t < rows; ++t) _mm512_mask_storeu_ps(result + t * stride, mask, lines[t]);
}

// The four tiles of sums, 0 to 3: one column or row of 16 after another.
static void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

static void store_sums(float* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + TILE_FLOATS, 64);
  _tile_stored(2, sums + 2 * TILE_FLOATS, 64);
  _tile_stored(3, sums + 3 * TILE_FLOATS, 64);
}

// The words of 16 rows from `first` on: tile after tile, zeros past the last row and past the depth.
static void rearrange_tiles(const ProductArgs& a, int64_t first, uint32_t* out) {
  const int64_t rows = smaller(SIDES, a.shape.rows - first), tiles = (a.depth + ALONG - 1) / ALONG;
  std::memset(out, 0, tiles * TILE_FLOATS * sizeof(uint32_t));
  for (int64_t t = 0; t < rows; ++t) {
    const bfloat16* x = matrix_row<bfloat16>(a.hidden, first + t);
    for (int64_t d = 0; d < a.depth; d += 2) {
      out[d / 2 * SIDES + t] = bit_cast<uint32_t>(d + 1 < a.depth ? Pairs::pack(x + d) : Pairs::pack_last(x + d));
    }
  }
}

// What a pass over the head's rows needs of them: where they begin, and how far apart in bytes.
struct HeadRows {
  const uint8_t* data;
  int64_t stride;
};

// Up to 32 rows of the head from `column` on; copied, with zeros past the depth, where a tile would reach past their ends.
// Not left to be zeros: states of rows that were multiplied before lay there, and zero times a NaN is one.
static HeadRows head_rows(const ProductArgs& a, int64_t column, int64_t columns, uint8_t* memory) {
  if (columns == PASSING && a.depth % ALONG == 0) {
    return {reinterpret_cast<const uint8_t*>(matrix_row<bfloat16>(a.weight, column)), a.weight.row_stride * 2};
  }
  const int64_t stride = (a.depth + ALONG - 1) / ALONG * 64;
  for (int64_t v = 0; v < columns; ++v) {
    std::memcpy(memory + v * stride, matrix_row<bfloat16>(a.weight, column + v), a.depth * 2);
    std::memset(memory + v * stride + a.depth * 2, 0, stride - a.depth * 2);
  }
  return {memory, stride};
}

// Rows of the head that are asked for while others are multiplied.
struct Ahead {
  const uint8_t* data;
  int64_t from, to;
};

// Up to 32 rows of the result from `first` on and up to 32 columns, in four tiles of sums.
static void fill_tiles(const ProductArgs& a, const HeadRows& head, const uint32_t* words, int64_t first, int64_t column,
                       int64_t columns, const Ahead& next) {
  const int64_t tiles = (a.depth + ALONG - 1) / ALONG, rows = smaller(PASSING, a.shape.rows - first);
  const bool below = rows > SIDES;
  const uint8_t* const beside = head.data + SIDES * head.stride;
  zero_sums();
  for (int64_t d = 0; d < tiles; ++d) {
    for (int64_t i = next.from; i < next.to; ++i) _mm_prefetch(next.data + i * head.stride + d * 64, _MM_HINT_T1);
    _tile_loadd(4, head.data + d * 64, head.stride);
    _tile_loadd(6, words + d * TILE_FLOATS, 64);
    _tile_loadd(5, beside + d * 64, head.stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (below) {
      _tile_loadd(7, words + (tiles + d) * TILE_FLOATS, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[4 * TILE_FLOATS];
  store_sums(sums);
  for (int64_t down = 0; down < rows; down += SIDES) {
    for (int64_t across = 0; across < columns; across += SIDES) {
      turn(sums + (down / SIDES * 2 + across / SIDES) * TILE_FLOATS,
           a.result + (first + down) * a.result_stride + column + across, a.result_stride,
           smaller(SIDES, rows - down), smaller(SIDES, columns - across), a.stream);
    }
  }
}

void multiply_tiles(const ProductArgs& a) {
  const int64_t rows = a.shape.rows, tiles = (a.depth + ALONG - 1) / ALONG;
  uint32_t* const words = reinterpret_cast<uint32_t*>(a.scratch);
  for (int64_t t = 0; t < rows; t += SIDES) rearrange_tiles(a, t, words + t * tiles * SIDES);
  uint8_t* const copies = reinterpret_cast<uint8_t*>(words + (rows + SIDES - 1) / SIDES * tiles * TILE_FLOATS);
  const int64_t staying = RESIDENT / (PASSING * tiles * 64), resident = PASSING * (staying > 1 ? staying : 1);

  parallel_for((a.shape.columns + GRAB - 1) / GRAB, a.shape.threads, 1, [&](int64_t grab, int worker) {
    uint8_t* const copy = copies + worker * PASSING * tiles * 64;
    configure_tiles();
    const int64_t begin = grab * GRAB, end = smaller(begin + GRAB, a.shape.columns);
    for (int64_t first = 0; first < rows; first += resident) {
      const int64_t last = smaller(first + resident, rows), passes = (last - first + PASSING - 1) / PASSING;
      for (int64_t v = begin; v < end; v += PASSING) {
        const int64_t columns = smaller(PASSING, end - v);
        const HeadRows head = head_rows(a, v, columns, copy);
        const int64_t ahead = head.data == copy || v + 2 * PASSING > a.shape.columns ? 0 : PASSING;
        for (int64_t pass = 0; pass < passes; ++pass) {
          const int64_t t = first + pass * PASSING;
          const Ahead next = {head.data + PASSING * head.stride, ahead * pass / passes, ahead * (pass + 1) / passes};
          fill_tiles(a, head, words + t * tiles * SIDES, t, v, columns, next);
        }
      }
    }
    _tile_release();
    fence_past_caches();
  });
}

// ---- The gradients: of a float32 gradient of logits, in two bfloat16 parts, which leave out 2^-16 of it at the most.

// The upper halves of floats, cut off, and in the upper halves what they leave of them, rounded; 0 of what is infinite.
static u32 first_part(f32 x) { return bit_cast<u32>(x) & 0xFFFF0000u; }
static u32 second_part(f32 x) {
  const f32 rest = x - bit_cast<f32>(first_part(x));
  return narrow<u32>((bit_cast<u32>(x) & 0x7FFFFFFFu) == 0x7F800000u ? f32{} : rest, bfloat16{}) << 16;
}

// The upper halves of two vectors of words, one after the other.
static __m512i upper_halves(u32 a, u32 b) {
  const u32 lane = iota<u32>();
  const u32 pairs = (4 * lane + 1) | (4 * lane + 3) << 16;  // of 64 half words, those of odd number
  return _mm512_permutex2var_epi16((__m512i)a, (__m512i)pairs, (__m512i)b);
}

static f32 load_some(const float* x, int64_t count) {
  if (count >= LANES) return load<f32>(x);
  const __mmask16 mask = static_cast<__mmask16>(count <= 0 ? 0 : (1u << count) - 1);
  return (f32)_mm512_maskz_loadu_ps(mask, x);
}

static __m512i load_some(const bfloat16* x, int64_t count) {
  if (count >= 2 * LANES) return _mm512_loadu_si512(x);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(count <= 0 ? 0 : (1u << count) - 1), x);
}

// Rows `from` to from + 32 of a matrix, pair by pair, as the tiles that others are multiplied with: of every 32 columns
// two tiles, `apart` words from those of the next 32. Zeros past the last row and column.
static void interleave(const Matrix& matrix, int64_t from, int64_t rows, int64_t columns, int64_t apart,
                       uint32_t* out) {
  const u32 lane = iota<u32>();
  const u32 low = lane | (lane + 32) << 16, high = low + 0x00100010u;
  for (int64_t p = 0; p < SIDES; ++p) {
    const int64_t row = from + 2 * p;
    for (int64_t d = 0; d < columns; d += ALONG) {
      const auto line = [&](int64_t at) {
        return load_some(matrix_row<bfloat16>(matrix, at < rows ? at : 0) + d, at < rows ? columns - d : 0);
      };
      const __m512i a = line(row), b = line(row + 1);
      uint32_t* const to = out + d / ALONG * apart + p * SIDES;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(a, (__m512i)low, b));
      _mm512_store_si512(to + TILE_FLOATS, _mm512_permutex2var_epi16(a, (__m512i)high, b));
    }
  }
}

// Adds to four tiles of sums, 0 to 3, the products of `steps` times two tiles in two parts each with two tiles. Calls
// ahead(k) before each step.
template <class Ahead>
static void add_parts(const uint32_t* parts, int64_t apart, const uint32_t* others, int64_t steps, bool below,
                      Ahead ahead) {
  for (int64_t k = 0; k < steps; ++k) {
    ahead(k);
    const uint32_t* const part = parts + k * 2 * TILE_FLOATS;
    _tile_loadd(6, others + k * 2 * TILE_FLOATS, 64);
    _tile_loadd(7, others + (k * 2 + 1) * TILE_FLOATS, 64);
    // The first parts of all, then the second: a sum is ready for the next product when three others have begun.
    for (int i = 0; i < 2; ++i) {
      _tile_loadd(4, part + i * TILE_FLOATS, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (!below) continue;
      _tile_loadd(5, part + apart + i * TILE_FLOATS, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

static void load_sums(const float* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + TILE_FLOATS, 64);
  _tile_loadd(2, sums + 2 * TILE_FLOATS, 64);
  _tile_loadd(3, sums + 3 * TILE_FLOATS, 64);
}

// Columns from `from` to `to` of up to 32 rows of the gradient of logits, in two parts: of 16 rows `steps` times two tiles
// after those of the 16 before.
static void split_rows(const ProductHiddenArgs& a, int64_t first, int64_t from, int64_t to, int64_t steps,
                       uint32_t* parts) {
  for (int64_t i = 0; i < smaller(PASSING, a.shape.rows - first); ++i) {
    const float* const x = matrix_row<float>(a.gradient, first + i) + from;
    uint32_t* out = parts + i / SIDES * steps * 2 * TILE_FLOATS + i % SIDES * LANES;
    for (int64_t at = 0; at < to - from; at += ALONG, out += 2 * TILE_FLOATS) {
      const f32 one = load_some(x + at, to - from - at), two = load_some(x + at + LANES, to - from - at - LANES);
      _mm512_store_si512(out, upper_halves(first_part(one), first_part(two)));
      _mm512_store_si512(out + TILE_FLOATS, upper_halves(second_part(one), second_part(two)));
    }
  }
}

// Asks for `count` floats, to the second cache.
static void fetch(const float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += LANES) _mm_prefetch(x + i, _MM_HINT_T1);
}

// A block of the result: HIDDEN_CHUNK columns of the gradient of logits after another, so that as many rows of the head,
// interleaved, stay in a core's second cache while 32 rows of the gradient after another are multiplied with them.
// What comes next is asked for meanwhile.
static void fill_block(const ProductHiddenArgs& a) {
  constexpr int64_t STEPS = HIDDEN_CHUNK / ALONG, OTHERS = STEPS * 2 * TILE_FLOATS;
  const int64_t rows = a.shape.rows, columns = a.shape.columns;
  const int64_t groups = (rows + PASSING - 1) / PASSING, blocks = (a.depth + ALONG - 1) / ALONG;
  float* const sums = a.scratch;  // [groups, blocks, 4 tiles]
  std::memset(sums, 0, groups * blocks * 4 * TILE_FLOATS * sizeof(float));
  uint32_t* const others = reinterpret_cast<uint32_t*>(sums + groups * blocks * 4 * TILE_FLOATS);
  uint32_t* const memory = others + blocks * OTHERS;
  // Of few rows a thread takes a part of the result's columns.
  const int64_t shares = smaller(blocks, groups >= 2 * a.shape.threads ? 1 : 2 * a.shape.threads);
  for (int64_t from = 0; from < columns; from += HIDDEN_CHUNK) {
    const int64_t to = smaller(from + HIDDEN_CHUNK, columns), some = (to - from + ALONG - 1) / ALONG;
    parallel_for(some, a.shape.threads, 1, [&](int64_t k, int) {
      interleave(a.weight, from + k * ALONG, columns, a.depth, OTHERS, others + k * 2 * TILE_FLOATS);
    });
    parallel_for(groups * shares, a.shape.threads, 1, [&](int64_t at, int worker) {
      const int64_t group = at / shares, first = group * PASSING, end = (at % shares + 1) * blocks / shares;
      uint32_t* const parts = memory + worker * 2 * OTHERS;
      split_rows(a, first, from, to, STEPS, parts);
      // The rows that are split next: the next ones, or the first ones further on.
      const int64_t next = group + 1 < groups ? first + PASSING : 0, ahead = group + 1 < groups ? from : to;
      configure_tiles();
      for (int64_t block = at % shares * blocks / shares; block < end; ++block) {
        float* const sum = sums + (group * blocks + block) * 4 * TILE_FLOATS;
        if (const int64_t row = next + block % PASSING; row < rows) {
          fetch(matrix_row<float>(a.gradient, row) + ahead, smaller(HIDDEN_CHUNK, columns - ahead));
        }
        load_sums(sum);
        add_parts(parts, OTHERS, others + block * OTHERS, some, rows - first > SIDES, [&](int64_t k) {
          fetch(sum + 4 * TILE_FLOATS * (k + STEPS) / STEPS, 4 * TILE_FLOATS / STEPS + LANES);
        });
        store_sums(sum);
      }
      _tile_release();
    });
  }
  parallel_for(rows, a.shape.threads, 8, [&](int64_t t, int) {
    for (int64_t d = 0; d < a.depth; d += SIDES) {
      const float* const sum = sums + (t / PASSING * blocks + d / ALONG) * 4 * TILE_FLOATS +
                               (t % PASSING / SIDES * 2 + d % ALONG / SIDES) * TILE_FLOATS + t % SIDES * SIDES;
      const int64_t count = smaller(SIDES, a.depth - d);
      std::memcpy(a.result + t * a.result_stride + d, sum, count * sizeof(float));
    }
  });
}

void multiply_hidden(const ProductHiddenArgs& a) {
  for (int64_t t = 0; t < a.shape.rows; t += HIDDEN_ROWS) {
    for (int64_t d = 0; d < a.depth; d += HIDDEN_WIDTH) {
      ProductHiddenArgs block = a;
      block.shape.rows = smaller(HIDDEN_ROWS, a.shape.rows - t);
      block.depth = smaller(HIDDEN_WIDTH, a.depth - d);
      block.gradient.data = matrix_row<float>(a.gradient, t);
      block.weight.data = matrix_row<bfloat16>(a.weight, 0) + d;
      block.result = a.result + t * a.result_stride + d;
      fill_block(block);
    }
  }
}

// 32 columns of the gradient of logits as rows, in two parts: of every 32 rows two tiles, each in two parts.
static void turn_parts(const ProductWeightArgs& a, int64_t column, int64_t steps, uint32_t* out) {
  for (int64_t k = 0; k < steps; ++k) {
    for (int64_t v = 0; v < PASSING; v += SIDES) {
      __m512 first[16], second[16];
      for (int64_t p = 0; p < SIDES; ++p) {
        const auto line = [&](int64_t t) {
          const float* const x = matrix_row<float>(a.gradient, t < a.shape.rows ? t : 0) + column + v;
          return load_some(x, t < a.shape.rows ? a.shape.columns - column - v : 0);
        };
        const f32 even = line(k * ALONG + 2 * p), odd = line(k * ALONG + 2 * p + 1);
        first[p] = (__m512)(first_part(even) >> 16 | first_part(odd));
        second[p] = (__m512)(second_part(even) >> 16 | second_part(odd));
      }
      turn_lines(first);
      turn_lines(second);
      uint32_t* const to = out + (v / SIDES * steps + k) * 2 * TILE_FLOATS;
      for (int i = 0; i < SIDES; ++i) _mm512_store_ps(to + i * SIDES, first[i]);
      for (int i = 0; i < SIDES; ++i) _mm512_store_ps(to + TILE_FLOATS + i * SIDES, second[i]);
    }
  }
}

// Puts 32 columns of a row of the result where they belong, or as many as there are.
static void put_row(const ProductWeightArgs& a, int64_t row, int64_t column, const float* low, const float* high) {
  const int64_t count = a.depth - column, at = row * a.result_stride + column;
  if (static_cast<Dtype>(a.result_dtype) == Dtype::bfloat16) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(high), _mm512_load_ps(low));
    bfloat16* const out = static_cast<bfloat16*>(a.result) + at;
    const __mmask32 mask = static_cast<__mmask32>(count >= ALONG ? ~0u : (1u << count) - 1);
    if (a.stream && count >= ALONG && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), both);
    } else {
      _mm512_mask_storeu_epi16(out, mask, both);
    }
    return;
  }
  float* const out = static_cast<float*>(a.result) + at;
  for (int64_t d = 0; d < smaller(count, ALONG); ++d) out[d] += d < SIDES ? low[d] : high[d - SIDES];
}

void multiply_weight(const ProductWeightArgs& a) {
  const int64_t steps = (a.shape.rows + ALONG - 1) / ALONG, blocks = (a.depth + ALONG - 1) / ALONG;
  uint32_t* const others = reinterpret_cast<uint32_t*>(a.scratch);  // [blocks, steps, 2 tiles]
  parallel_for(steps, a.shape.threads, 1, [&](int64_t k, int) {
    interleave(a.hidden, k * ALONG, a.shape.rows, a.depth, steps * 2 * TILE_FLOATS, others + k * 2 * TILE_FLOATS);
  });
  uint32_t* const memory = others + blocks * steps * 2 * TILE_FLOATS;
  const int64_t passes = (a.shape.columns + PASSING - 1) / PASSING;
  // A thread takes as much of the result as a page of 2 MB at a time, so that threads do not wait for each other's.
  const int64_t together = 1 + (int64_t{2} << 20) / (WEIGHT_PASSES * PASSING * a.depth * 2);
  parallel_for((passes + WEIGHT_PASSES - 1) / WEIGHT_PASSES, a.shape.threads, together, [&](int64_t at, int worker) {
    uint32_t* const parts = memory + worker * WEIGHT_PASSES * steps * 4 * TILE_FLOATS;
    const int64_t from = at * WEIGHT_PASSES, to = smaller(from + WEIGHT_PASSES, passes);
    for (int64_t pass = from; pass < to; ++pass) {
      turn_parts(a, pass * PASSING, steps, parts + (pass - from) * steps * 4 * TILE_FLOATS);
    }
    configure_tiles();
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t pass = from; pass < to; ++pass) {
        const int64_t v = pass * PASSING, rows = smaller(PASSING, a.shape.columns - v);
        alignas(64) float sums[4 * TILE_FLOATS];
        zero_sums();
        add_parts(parts + (pass - from) * steps * 4 * TILE_FLOATS, steps * 2 * TILE_FLOATS,
                  others + block * steps * 2 * TILE_FLOATS, steps, rows > SIDES, [](int64_t) {});
        store_sums(sums);
        for (int64_t i = 0; i < rows; ++i) {
          const float* const low = sums + i / SIDES * 2 * TILE_FLOATS + i % SIDES * SIDES;
          put_row(a, v + i, block * ALONG, low, low + TILE_FLOATS);
        }
      }
    }
    _tile_release();
    fence_past_caches();
  });
}

// Whether this machine has tiles, and the kernel lets this process use them: on Linux it asks to be asked.
bool tiles_allowed() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

DAM_END
