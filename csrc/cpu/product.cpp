// product: hidden states times a head, both of 16 bits, summed and left in float32. Contract: dam/backends/cpu.py.
#include "product.h"

#if defined(DAM_HAVE_BFLOAT16) && defined(__AVX512F__)
#define DAM_MULTIPLIES_BFLOAT16
namespace dam::avx512_bf16 {
void multiply_pairs(const ProductArgs&);
void multiply_tiles(const ProductArgs&);
void multiply_hidden(const ProductHiddenArgs&);
void multiply_weight(const ProductWeightArgs&);
}  // namespace dam::avx512_bf16
#endif

DAM_BEGIN

// Each element widened to float32, and multiplied there.
template <class Element_>
struct Widened {
  using Element = Element_;
  static constexpr int DEPTH = 1;
  static float pack(const Element* x) { return load_one(x); }
  static float pack_last(const Element*) { return 0.0f; }  // nothing is ever left
  static f32 along(const Element* x) { return load_lanes(x); }
  static f32 add(f32 sum, f32 a, f32 b) { return sum + a * b; }
};

static void multiply_rows(const ProductArgs& a) {
#if defined(DAM_MULTIPLIES_BFLOAT16)
  if (a.instructions == PAIRS) return avx512_bf16::multiply_pairs(a);
  if (a.instructions == TILES) return avx512_bf16::multiply_tiles(a);
#endif
  if (static_cast<Dtype>(a.shape.dtype) == Dtype::bfloat16) {
    multiply<Widened<bfloat16>>(a);
  } else {
    multiply<Widened<float16>>(a);
  }
}

void product(const ProductArgs& a) {
  for (int64_t t = 0; t < a.shape.rows; t += PRODUCT_ROWS) {
    ProductArgs some = a;
    some.shape.rows = smaller(PRODUCT_ROWS, a.shape.rows - t);
    some.hidden.data = matrix_row<bfloat16>(a.hidden, t);  // or float16, as wide
    some.result = a.result + t * a.result_stride;
    multiply_rows(some);
  }
}

// Not asked for where there are no tiles.
void product_hidden(const ProductHiddenArgs& a) {
#if defined(DAM_MULTIPLIES_BFLOAT16)
  avx512_bf16::multiply_hidden(a);
#endif
  (void)a;
}

void product_weight(const ProductWeightArgs& a) {
#if defined(DAM_MULTIPLIES_BFLOAT16)
  avx512_bf16::multiply_weight(a);
#endif
  (void)a;
}

DAM_END
