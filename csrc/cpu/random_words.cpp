// random_words: blocks of Philox for numbers that torch makes of them. Contract: _blocks of dam/ops/_philox.py.
#include "rows.h"

DAM_BEGIN

constexpr int64_t BLOCKS_PER_GRAB = 4096;  // what a thread takes at a time

void random_words(const RandomWordsArgs& a) {
  const int64_t grab = BLOCKS_PER_GRAB / (a.count + 1) + 1;
  parallel_for(a.samples * a.rows, a.threads, grab, [&](int64_t line, int) {
    const uint64_t row_id = static_cast<uint64_t>(a.row_ids[line % a.rows]);
    const Stream stream{a.seed, row_id, static_cast<uint32_t>(a.stream + line / a.rows)};
    int64_t* const high = a.high + line * a.count;
    int64_t* const low = a.low + line * a.count;
    for (int64_t i = 0; i < a.count; i += WIDE) {
      const Words<u64> words = philox(iota<u64>() + static_cast<uint64_t>(i), stream);
      uint64_t first[WIDE], second[WIDE];
      store(first, words.x & uint64_t{0xFFFFFFFF});
      store(second, words.y & uint64_t{0xFFFFFFFF});
      const int64_t lanes = a.count - i < WIDE ? a.count - i : WIDE;
      for (int64_t n = 0; n < lanes; ++n) {
        high[i + n] = static_cast<int64_t>(first[n]);
        low[i + n] = static_cast<int64_t>(second[n]);
      }
    }
  });
}

DAM_END
