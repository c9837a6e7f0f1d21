// update_scan over one cell: the driver of the stages. Included inside the namespace of an instruction set, after
// scan_stages.inl and one of scan_bytes.inl, scan_plain.inl.

// Bytes of one element.
static int64_t width_of(int32_t dtype) { return dtype == FP32 ? 4 : 2; }

// Copies the source's values to fp32, exactly.
static void to_values(const uint8_t* source, int32_t dtype, int64_t n, float* out) {
  if (dtype == FP32) {
    __builtin_memcpy(out, source, static_cast<size_t>(4 * n));
    return;
  }
  const auto convert = [=](auto to_fp32) {
    for (int64_t i = 0; i < n; ++i) {
      uint16_t code;
      __builtin_memcpy(&code, source + 2 * i, sizeof code);
      out[i] = to_fp32(code);
    }
  };
  // One loop for each dtype: with the choice inside, compilers do not vectorise it.
  if (dtype == BF16)
    convert([](uint32_t code) { return bf16_to_fp32(code); });
  else
    convert([](uint32_t code) { return fp16_to_fp32(code); });
}

static void to_codes(const float* values, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = round_to_bf16(values[i]);
}

OFFPRIN_INLINE int64_t popcount(const uint64_t* words, int64_t n) {
  int64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += __builtin_popcountll(words[i]);
  return sum;
}

// Bits added up at each position.
struct BitSum {
  uint64_t ones, twos;
};
OFFPRIN_INLINE BitSum add_three(uint64_t a, uint64_t b, uint64_t c) {
  return {a ^ b ^ c, (a & b) | ((a ^ b) & c)};
}

// One block: `rows` whole rows of `columns` elements that lie one after the other, or a part of one row.
struct Block {
  int64_t row, column, rows, columns;
};

struct Scan {
  const UpdateScan& job;
  const Cell& cell;
  Tally& tally;
  Scratch& scratch;
  pthread_mutex_t* column_lock;
  NormSums code_sums{}, value_sums{};
  Exponents exponents{};
  Distances distances{};
  int64_t row_changed = 0;    // of the row that blocks are still coming for
  int waiting_rows = 0;       // rows not added to the byte counters yet
  int64_t counter_rows = 0;   // rows added to them

  const uint8_t* at(const void* matrix, int32_t dtype, int64_t row, int64_t column) const {
    return static_cast<const uint8_t*>(matrix) + (row * job.columns + column) * width_of(dtype);
  }

  // The block's codes: in place where possible, else padded with zeros to whole words in scratch.
  const uint8_t* codes(int which, const uint8_t* source, bool stored_as_bf16, int64_t n, int64_t padded) const {
    if (stored_as_bf16 && n == padded) return source;
    uint16_t* out = scratch.codes[which];
    if (stored_as_bf16)
      __builtin_memcpy(out, source, static_cast<size_t>(2 * n));
    else
      to_codes(scratch.values[which], n, out);
    __builtin_memset(out + n, 0, static_cast<size_t>(2 * (padded - n)));
    return reinterpret_cast<const uint8_t*>(out);
  }

  // Words of the block under one rule on bf16 codes.
  const uint64_t* words_of(const Rule& rule, const uint8_t* a, const uint8_t* b, int64_t n, int64_t valid,
                           const Survey& seen, bool& rounded) {
    if (rule.code == BITWISE || is_bitwise(rule, seen)) return scratch.bitwise;
    uint64_t* words = scratch.other;
    if (rule.code == STORAGE) {
      words_stored(a, b, n, words);
    } else if (rule.code == ULP) {
      const double least = rule.threshold + 1;
      if (least <= 65535)
        words_ulp(a, b, n, least < 0 ? 0 : static_cast<unsigned>(least), words);
      else
        words_ulp(a, b, n, 65535, words);  // the largest distance of two numbers is 65280
    } else {
      if (!rounded) {
        to_values(a, BF16, n, scratch.rounded[0]);
        to_values(b, BF16, n, scratch.rounded[1]);
        rounded = true;
      }
      words_values(rule, scratch.rounded[0], scratch.rounded[1], n, words);
    }
    drop_padding(words, valid);
    return words;
  }

  // Different normal numbers are more than 2^-9 of the larger one apart.
  static bool is_bitwise(const Rule& rule, const Survey& seen) {
    return rule.code == ETA && rule.threshold <= 0x1p-9 && seen.smallest >= SMALLEST_NORMAL && !seen.nonfinite();
  }

  static void drop_padding(uint64_t* words, int64_t valid) {
    if (valid % 64 != 0) words[valid / 64] &= (uint64_t{1} << (valid % 64)) - 1;
  }

  void add_block(const Block& block, Ahead ahead) {
    const int64_t n = block.rows * block.columns, padded = (n + 63) / 64 * 64;
    const uint8_t* base = at(job.base, job.base_dtype, block.row, block.column);
    const uint8_t* tuned = at(job.tuned, job.tuned_dtype, block.row, block.column);
    const bool uncast = job.additive || job.base_dtype != BF16 || job.tuned_dtype != BF16;
    if (uncast) load_values(base, tuned, n, padded);
    const uint8_t* a = codes(0, base, job.base_dtype == BF16, n, padded);
    const uint8_t* b = codes(1, tuned, job.tuned_dtype == BF16 && !job.additive, n, padded);

    // Four lines hold a word's worth of bf16 pairs; what the other stages do not fetch is left to the first.
    const bool measured = job.ulp_histogram != nullptr || (NORMS_ASK_DISTANCES && job.norms != nullptr);
    const int survey_lines = 4 - (job.exponent_histogram != nullptr ? EXPONENT_LINES : 0) -
                             (measured ? DISTANCE_LINES : 0) - (job.norms != nullptr ? NORM_LINES : 0);
    const Survey seen = survey(a, b, padded, ahead, survey_lines, scratch.bitwise);
    if (seen.zeros() || seen.nan()) forgive_zeros_and_nan(a, b, padded, scratch.bitwise);
    bool rounded = false;
    for (int32_t r = job.rules - 1; r >= 0; --r) {
      const Rule& rule = job.rule[r];
      if (uncast && rule.code != ULP) {
        words_values(rule, scratch.values[0], scratch.values[1], padded, scratch.other);
        drop_padding(scratch.other, n);
        tally.rules[r][1] += popcount(scratch.other, padded / 64);
      }
      if (r > 0 && rule.code == ATOL && !seen.nan()) {
        tally.rules[r][0] += count_apart(a, b, padded, static_cast<float>(rule.threshold));
        continue;
      }
      // Rule 0 comes last: its words are still there for the mask.
      const uint64_t* words = words_of(rule, a, b, padded, n, seen, rounded);
      tally.rules[r][0] += popcount(words, padded / 64);
      if (r == 0) use_words(block, words, padded / 64, a, padded - n, seen, ahead);
    }
    if (job.nonfinite && seen.nonfinite()) count_nonfinite(a, b, padded, tally.counters);
    Distant told{0, 0, Distant::UNTOLD};
    if (measured) told = distances.add_block(a, b, scratch.bitwise, padded, seen, scratch.distances, ahead, tally);
    if (job.norms != nullptr) {
      // Magnitudes less than 14 * 128 ULP apart are at most 14 exponents apart: b - a has at most 24 bits.
      add_code_norms(a, b, padded, !seen.nonfinite() && told.magnitudes < 14 * 128, ahead, code_sums);
      if (uncast) value_sums.add_values(scratch.values[0], scratch.values[1], padded);
    }
    if (!job.transitions) return;
    if (told.sign_flips == Distant::UNTOLD || seen.zeros())
      count_transitions(a, b, padded, seen, tally.counters);
    else
      tally.counters[SIGN_FLIPS] += told.sign_flips;
  }

  void load_values(const uint8_t* base, const uint8_t* tuned, int64_t n, int64_t padded) {
    float *x = scratch.values[0], *y = scratch.values[1];
    to_values(base, job.base_dtype, n, x);
    to_values(tuned, job.tuned_dtype, n, y);
    if (job.additive)
      for (int64_t i = 0; i < n; ++i) y[i] = add_fp32(x[i], y[i]);
    __builtin_memset(x + n, 0, static_cast<size_t>(4 * (padded - n)));
    __builtin_memset(y + n, 0, static_cast<size_t>(4 * (padded - n)));
  }

  // Exponents, mask, row and column counts of the changed words.
  void use_words(const Block& block, const uint64_t* words, int64_t count, const uint8_t* a, int64_t pads,
                 const Survey& seen, Ahead& ahead) {
    if (job.exponent_histogram != nullptr) {
      exponents.add_block(a, words, 64 * count, seen.base_largest, ahead, tally);
      tally.exponents[0][0] -= pads;
    }
    if (job.mask == nullptr && job.row_counts == nullptr && job.col_counts == nullptr) return;
    for (int64_t r = 0; r < block.rows; ++r) use_row(block, r, words);
  }

  // The words of the block's r-th row, shifted down to begin at bit 0 where they do not.
  const uint64_t* row_words(const Block& block, int64_t r, const uint64_t* words) const {
    const int64_t first = r * block.columns / 64;
    const int shift = static_cast<int>(r * block.columns % 64);
    if (block.rows == 1 || (shift == 0 && block.columns % 64 == 0)) return words + first;
    uint64_t* out = scratch.row;
    for (int64_t i = 0; i < (block.columns + 63) / 64; ++i) {
      out[i] = words[first + i] >> shift;
      if (shift != 0) out[i] |= words[first + i + 1] << (64 - shift);
    }
    drop_padding(out, block.columns);
    return out;
  }

  void use_row(const Block& block, int64_t r, const uint64_t* block_words) {
    const uint64_t* words = row_words(block, r, block_words);
    const int64_t row = block.row + r, count = (block.columns + 63) / 64;
    row_changed += popcount(words, count);
    if (job.mask != nullptr)
      __builtin_memcpy(job.mask + row * row_bytes(job.columns) + block.column / 8, words,
                       static_cast<size_t>(8 * count));
    if (job.col_counts != nullptr)
      __builtin_memcpy(scratch.waiting[waiting_rows] + (block.column - cell.column_begin) / 64, words,
                       static_cast<size_t>(8 * count));
    if (block.column + block.columns == cell.column_end) end_row(row);
  }

  void end_row(int64_t row) {
    if (job.row_counts != nullptr) {
      // A row that lies in one cell is this cell's own; else its cells add to it.
      if (cell.column_begin == 0 && cell.column_end == job.columns)
        job.row_counts[row] = row_changed;
      else
        __atomic_fetch_add(job.row_counts + row, row_changed, __ATOMIC_RELAXED);
    }
    row_changed = 0;
    if (job.col_counts == nullptr) return;
    const bool last = row + 1 == cell.row_end;
    if (++waiting_rows == ROWS_AT_ONCE || last) add_waiting_rows();
    if (counter_rows + ROWS_AT_ONCE > COUNTER_ROWS || last) {
      empty_counters(scratch.column_counters, cell.column_end - cell.column_begin, job.col_counts + cell.column_begin,
                     column_lock);
      counter_rows = 0;
    }
  }

  // The counters of a strip and a block do not fit L1 together: rows are added up first, to three bits.
  void add_waiting_rows() {
    const int64_t count = (cell.column_end - cell.column_begin + 63) / 64;
    for (int r = waiting_rows; r < ROWS_AT_ONCE; ++r)
      __builtin_memset(scratch.waiting[r], 0, static_cast<size_t>(8 * count));
    uint8_t* counters = scratch.column_counters;
    for (int64_t i = 0; i < count; ++i, counters += 64) {
      const auto row = [&](int r) { return scratch.waiting[r][i]; };
      const BitSum low = add_three(row(0), row(1), row(2)), middle = add_three(low.ones, row(3), row(4));
      const BitSum high = add_three(middle.ones, row(5), row(6));
      const BitSum twos = add_three(low.twos, middle.twos, high.twos);
      const Counters c = add_bits(add_bits(load_counters(counters), high.ones, 1), twos.ones, 2);
      store_counters(counters, add_bits(c, twos.twos, 4));
    }
    counter_rows += waiting_rows;
    waiting_rows = 0;
  }

  void run() {
    exponents.begin();
    distances.begin();
    const int64_t columns = cell.column_end - cell.column_begin;
    // Narrow matrices: several whole rows make one block.
    const int64_t rows = columns == job.columns && columns <= BLOCK / 2 ? BLOCK / columns : 1;
    for (int64_t row = cell.row_begin; row < cell.row_end; row += rows) {
      const int64_t rows_left = cell.row_end - row;
      for (int64_t column = cell.column_begin; column < cell.column_end; column += BLOCK) {
        const int64_t columns_left = cell.column_end - column;
        const bool last = columns_left <= BLOCK;
        const int64_t next_row = last ? row + rows : row, next_column = last ? cell.column_begin : column + BLOCK;
        const uint8_t* next_base = at(job.base, job.base_dtype, next_row, next_column);
        const uint8_t* next_tuned = at(job.tuned, job.tuned_dtype, next_row, next_column);
        add_block({row, column, rows < rows_left ? rows : rows_left, last ? columns_left : BLOCK},
                  {next_base, next_tuned});
      }
    }
    exponents.finish(tally);
    distances.finish(tally);
    code_sums.finish(tally.norms[0]);
    value_sums.finish(tally.norms[1]);
  }
};

void scan_cell(const UpdateScan& job, const Cell& cell, Tally& tally, Scratch& scratch, pthread_mutex_t* column_lock) {
  Scan scan{job, cell, tally, scratch, column_lock};
  scan.run();
}
