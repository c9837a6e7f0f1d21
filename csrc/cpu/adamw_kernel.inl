// AdamW on blocks of one tensor. Included inside the namespace of an instruction set, behind namespace offprin's
// numerics.h and the vector layer.

using adamw::BLOCK;

struct Factors {
  float decay, lerp, beta2, square, eps, scale;
  bool near_grad;
};

OFFPRIN_INLINE float widened(float x) { return x; }
OFFPRIN_INLINE float widened(uint16_t code) { return bf16_to_fp32(code); }
OFFPRIN_INLINE void narrow(float x, float& stored) { stored = x; }
OFFPRIN_INLINE void narrow(float x, uint16_t& stored) { stored = round_to_bf16(x); }
// The value in bf16; of NaN anything.
OFFPRIN_INLINE float visible(float x) {
  const uint32_t bits = bits_of(x);
  return float_of((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000);
}
OFFPRIN_INLINE float visible(uint16_t code) { return bf16_to_fp32(code); }

// Whether a step changed the value in bf16 (see visibly_differ), given that it never turns NaN into a number.
template <typename P>
OFFPRIN_INLINE bool visibly_changed(P before, P after) {
  const float a = widened(before), b = widened(after);
  return ((visible(before) != visible(after)) | (b != b)) & (a == a);
}

// A parameter in fp32, with what its rounding kept of it.
template <int ROUNDING, typename P>
OFFPRIN_INLINE float opened(P param, const uint16_t* extra, int64_t i) {
  if constexpr (ROUNDING == adamw::MASTER)
    return join_master(param, extra[i]);
  else if constexpr (ROUNDING == adamw::KAHAN)
    return widened(param) + widened(extra[i]);
  else
    return widened(param);
}

template <int ROUNDING, typename P>
OFFPRIN_INLINE void closed(float w, const uint16_t* noise, P& param, uint16_t* extra, int64_t i) {
  if constexpr (ROUNDING == adamw::MASTER) {
    split_master(w, param, extra[i]);
  } else if constexpr (ROUNDING == adamw::STOCHASTIC) {
    param = round_stochastic(w, noise[i]);
  } else {
    narrow(w, param);
    // nothing can be kept of what overflowed
    if constexpr (ROUNDING == adamw::KAHAN)
      extra[i] = round_to_bf16(float_of(offprin::select(is_finite_code(param), bits_of(w - widened(param)), 0)));
  }
}

// One step of n coordinates; every array has an entry for each of them. Those that ROUNDING does not need may be null.
template <typename P, typename S, int ROUNDING, bool TRACKED>
__attribute__((noinline)) static void advance(int64_t n, const Factors& factors, P* __restrict param,
                                              const P* __restrict grad, S* __restrict exp_avg, S* __restrict exp_avg_sq,
                                              uint16_t* __restrict extra, const uint16_t* __restrict noise,
                                              const float* __restrict step_size, const float* __restrict root,
                                              uint32_t* __restrict same) {
  const Factors f = factors;
  for (int64_t i = 0; i < n; ++i) {
    // The division by one that it mostly is costs nothing beside the memory.
    const float g = widened(grad[i]) / f.scale;
    const float m = widened(exp_avg[i]), v = widened(exp_avg_sq[i]);
    const P before = param[i];
    float w = opened<ROUNDING>(before, extra, i) * f.decay;
    const float new_m = __builtin_fmaf(f.lerp, g - m, float_of(offprin::select(f.near_grad, bits_of(g), bits_of(m))));
    const float new_v = __builtin_fmaf(f.square * g, g, f.beta2 * v);
    w -= (step_size[i] * new_m) / (__builtin_sqrtf(new_v) / root[i] + f.eps);
    narrow(new_m, exp_avg[i]);
    narrow(new_v, exp_avg_sq[i]);
    closed<ROUNDING>(w, noise, param[i], extra, i);
    if constexpr (TRACKED) same[i] = !visibly_changed(before, param[i]);
  }
}

// The lowest `n` bits, n at most 64.
OFFPRIN_INLINE uint64_t lowest(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// how far list_places may write beyond its end
constexpr int64_t LIST_SLACK = 4;

// Writes four places, of which as many count as the word has bits; returns the rest of the word.
OFFPRIN_INLINE uint64_t list_four(uint64_t word, uint32_t place, uint32_t* places) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, word &= word - 1)
    places[i] = place + static_cast<uint32_t>(__builtin_ctzll(word | uint64_t{1} << 63));
  return word;
}

// Writes the places of the set bits, counted from `place` on.
static void list_places(const uint64_t* words, int64_t count, uint32_t place, uint32_t* places) {
  for (int64_t i = 0; i < count; ++i, place += 64) {
    // By fours without asking, for a branch on each bit would be mispredicted once a word.
    const int set = __builtin_popcountll(words[i]);
    uint64_t word = list_four(words[i], place, places);
    for (int listed = 4; listed < set; listed += 4) word = list_four(word, place, places + listed);
    places += set;
  }
}

template <typename P, typename S, int ROUNDING, bool TRACKED>
class Walk {
 public:
  Walk(const MaskedAdamw& job, const int64_t* slots, int64_t base) : slots_(slots), base_(base) {
    const float* h = job.hypers + slots[adamw::HYPER] * adamw::HYPERS;
    factors_ = {h[adamw::DECAY], h[adamw::LERP], h[adamw::BETA2], h[adamw::SQUARE], h[adamw::EPS],
                h[adamw::SCALE] * h[adamw::SIGN], h[adamw::NEAR_GRAD] != 0};
    cohorts_ = job.cohorts + slots[adamw::FIRST_COHORT] * adamw::COHORTS;
    for (int64_t i = 0; i < BLOCK; ++i) {
      step_size_[i] = cohorts_[adamw::STEP_SIZE];
      root_[i] = cohorts_[adamw::ROOT];
    }
  }

  int64_t run(int64_t first, int64_t blocks) {
    const int64_t numel = slots_[adamw::NUMEL];
    const uint64_t* words = column<const uint64_t>(adamw::MASK);
    const int64_t* prefix = column<const int64_t>(adamw::PREFIX);
    for (int64_t block = first; block < first + blocks; ++block) {
      const int64_t place = block * BLOCK, n = numel - place < BLOCK ? numel - place : BLOCK;
      const int64_t entry = words != nullptr ? prefix[block] : place;
      const int64_t set = words != nullptr ? prefix[block + 1] - entry : n;
      if (set == 0) continue;
      if (listed_ + set > BLOCK || set == n) flush();
      if (set == n)
        stretch(column<P>(adamw::PARAM) + place, column<const P>(adamw::GRAD) + place, entry, n, nullptr, place);
      else
        list(words + place / 64, place, n, entry, set);
    }
    flush();
    return changes_;
  }

 private:
  template <typename T>
  T* column(int slot) const {
    return reinterpret_cast<T*>(slots_[slot]);
  }

  // Notes the coordinates of one more block, and has memory fetch them meanwhile.
  void list(const uint64_t* words, int64_t place, int64_t n, int64_t entry, int64_t set) {
    if (listed_ == 0) entry_ = entry;
    uint32_t* const places = places_ + listed_;
    list_places(words, (n + 63) / 64, static_cast<uint32_t>(place - base_), places);
    const P* const param = column<const P>(adamw::PARAM) + base_;
    const P* const grad = column<const P>(adamw::GRAD) + base_;
    for (int64_t i = 0; i < set; ++i) {
      __builtin_prefetch(param + places[i], 1);
      __builtin_prefetch(grad + places[i]);
    }
    listed_ += set;
  }

  // Steps the listed coordinates. Only their parameters are written: others may be another's to write at this moment.
  void flush() {
    if (listed_ == 0) return;
    P* const param = column<P>(adamw::PARAM) + base_;
    const P* const grad = column<const P>(adamw::GRAD) + base_;
    for (int64_t i = 0; i < listed_; ++i) {
      param_[i] = param[places_[i]];
      grad_[i] = grad[places_[i]];
    }
    stretch(param_, grad_, entry_, listed_, places_, base_);
    for (int64_t i = 0; i < listed_; ++i) param[places_[i]] = param_[i];
    listed_ = 0;
  }

  // Steps n coordinates, at most a block: those at `place` on, or at the places listed, counted from it.
  void stretch(P* param, const P* grad, int64_t entry, int64_t n, const uint32_t* places, int64_t place) {
    if (const uint8_t* cohort = column<const uint8_t>(adamw::COHORT)) {
      for (int64_t i = 0; i < n; ++i) {
        const float* row = cohorts_ + cohort[entry + i] * adamw::COHORTS;
        step_size_[i] = row[adamw::STEP_SIZE];
        root_[i] = row[adamw::ROOT];
      }
    }
    if constexpr (ROUNDING == adamw::STOCHASTIC) {
      const uint64_t stream = static_cast<uint64_t>(slots_[adamw::STREAM]);
      const uint64_t from = static_cast<uint64_t>(slots_[adamw::OFFSET] + place);
      if (places == nullptr)
        for (uint64_t i = 0; i < static_cast<uint64_t>(n); ++i) noise_[i] = splitmix64(stream, from + i) >> 48;
      else
        for (int64_t i = 0; i < n; ++i) noise_[i] = splitmix64(stream, from + places[i]) >> 48;
    }
    constexpr bool HAS_EXTRA = ROUNDING == adamw::KAHAN || ROUNDING == adamw::MASTER;
    advance<P, S, ROUNDING, TRACKED>(n, factors_, param, grad, column<S>(adamw::EXP_AVG) + entry,
                                     column<S>(adamw::EXP_AVG_SQ) + entry,
                                     HAS_EXTRA ? column<uint16_t>(adamw::EXTRA) + entry : nullptr, noise_, step_size_,
                                     root_, same_);
    if constexpr (TRACKED) note(entry, n);
  }

  // Counts the visible changes of entries, and marks them.
  void note(int64_t entry, int64_t n) {
    uint32_t same = 0;
    for (int64_t i = 0; i < n; ++i) same += same_[i];
    changes_ += n - same;
    uint64_t* changed = column<uint64_t>(adamw::CHANGED);
    if (changed == nullptr || same == n) return;
    changed += entry / 64;
    const int shift = static_cast<int>(entry % 64);
    uint64_t carry = 0;
    for (int64_t i = 0; i < n; i += 64) {
      const uint64_t word = up_to(same_ + i, 0) & lowest(n - i);
      const bool shared = i == 0 || i + 64 > n + shift;
      mark(changed + i / 64, word << shift | carry, shared);
      carry = shift != 0 ? word >> (64 - shift) : 0;
    }
    mark(changed + (n + 63) / 64, carry, true);
  }

  // Words at the ends may be shared with entries of other threads.
  static void mark(uint64_t* changed, uint64_t bits, bool shared) {
    if (bits == 0) return;
    if (shared)
      __atomic_fetch_or(changed, bits, __ATOMIC_RELAXED);
    else
      *changed |= bits;
  }

  const int64_t* slots_;
  int64_t base_;  // from where places are counted
  Factors factors_;
  const float* cohorts_;
  int64_t listed_ = 0, entry_ = 0, changes_ = 0;
  alignas(64) uint32_t places_[BLOCK + LIST_SLACK];
  alignas(64) P param_[BLOCK];
  alignas(64) P grad_[BLOCK];
  alignas(64) float step_size_[BLOCK];
  alignas(64) float root_[BLOCK];
  alignas(64) uint16_t noise_[BLOCK];
  alignas(64) uint32_t same_[BLOCK];
};

template <typename P, typename S, int ROUNDING>
static int64_t step_as(const MaskedAdamw& job, const int64_t* slots, int64_t first, int64_t blocks) {
  if (job.changes != nullptr || slots[adamw::CHANGED] != 0)
    return Walk<P, S, ROUNDING, true>(job, slots, first * BLOCK).run(first, blocks);
  return Walk<P, S, ROUNDING, false>(job, slots, first * BLOCK).run(first, blocks);
}

template <typename S>
static int64_t step_state(const MaskedAdamw& job, const int64_t* slots, int64_t first, int64_t blocks) {
  if (job.param_dtype == FP32) return step_as<float, S, adamw::NEAREST>(job, slots, first, blocks);
  switch (job.rounding) {
    case adamw::STOCHASTIC:
      return step_as<uint16_t, S, adamw::STOCHASTIC>(job, slots, first, blocks);
    case adamw::KAHAN:
      return step_as<uint16_t, S, adamw::KAHAN>(job, slots, first, blocks);
    case adamw::MASTER:
      return step_as<uint16_t, S, adamw::MASTER>(job, slots, first, blocks);
    default:
      return step_as<uint16_t, S, adamw::NEAREST>(job, slots, first, blocks);
  }
}

static int64_t step(const MaskedAdamw& job, const int64_t* slots, int64_t first, int64_t blocks) {
  return job.state_dtype == FP32 ? step_state<float>(job, slots, first, blocks)
                                 : step_state<uint16_t>(job, slots, first, blocks);
}

extern const AdamwKernels adamw_kernels = {step};
