// lowrank_select: a radix selection over keys that are made anew on every pass and never kept.
//
// The first pass counts the keys by their top 16 bits, which tells the bucket with the threshold. The second sets the bit
// of every key below the bucket and lists the few coordinates inside it, among which the exact ones are then chosen.
// A bucket too full to list is counted first by the lower bits of its keys, then, all of them equal, by place.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "../kernels.h"
#include "select_passes.h"

namespace offprin::cpu {
namespace {

// The bin in which the running sum reaches `count`, as a bucket.
Bucket narrow(const Bucket& bucket, const std::vector<int64_t>& bins, int shift, int64_t count) {
  int64_t below = bucket.below;
  size_t bin = 0;
  while (bin < bins.size() && below + bins[bin] < count) below += bins[bin++];
  if (bin == bins.size()) Selection::changed();
  const uint32_t first = bucket.first + (static_cast<uint32_t>(bin) << shift);
  return {first, first + ((1u << shift) - 1), below, bins[bin]};
}

void refuse_nonfinite(const SelectKeys& keys, const std::vector<int64_t>& bins, int shift) {
  if (keys.source == KeySource::HASH) return;
  const bool product = keys.source == KeySource::PRODUCT;
  const uint32_t infinity = keys.source == KeySource::WEIGHT && keys.dtype != FP32
                                ? (keys.dtype == BF16 ? 0x7F80u : 0x7C00u)
                                : 0x7F800000u;
  const size_t bin = (product ? 0x7FFFFFFF - infinity : infinity) >> shift;
  const auto begin = product ? bins.begin() : bins.begin() + static_cast<std::ptrdiff_t>(bin);
  const auto end = product ? bins.begin() + static_cast<std::ptrdiff_t>(bin) + 1 : bins.end();
  if (!std::any_of(begin, end, [](int64_t n) { return n != 0; })) return;
  throw std::invalid_argument(product ? "the product of left, values and right overflows fp32; scale values down"
                                      : "weight holds NaN or Inf; its smallest entries are undefined");
}

}  // namespace

void select(const SelectKeys& keys, int64_t count, uint64_t* words, Isa isa, int threads) {
  Selection selection(keys, isa, threads);
  const int64_t total = selection.total(), row_words = row_bytes(keys.columns) / 8;
  if (total == 0) return;
  const int shift = keys.source == KeySource::HASH ? 16 : keys.source == KeySource::WEIGHT && keys.dtype != FP32 ? 0 : 15;
  Bucket bucket{0, LARGEST, 0, total};
  const std::vector<int64_t> bins = selection.histogram(bucket, shift);
  refuse_nonfinite(keys, bins, shift);
  if (count == 0) {
    std::fill_n(words, keys.rows * row_words, uint64_t{0});
    return;
  }
  bucket = narrow(bucket, bins, shift, count);
  // Eight bytes for each of the listed coordinates: at most a sixty-fourth of the fp32 matrix.
  const int64_t listed = std::max<int64_t>(4096, total / 128);
  const auto decided = [&] { return bucket.below + bucket.inside == count || bucket.inside <= listed; };
  if (!decided() && shift > 0) bucket = narrow(bucket, selection.histogram(bucket, 0), 0, count);

  Cut cut{bucket.first, bucket.last, 0, total};
  int64_t certain = bucket.below, expected = bucket.inside;
  if (bucket.below + bucket.inside == count) {
    cut.known = total;
    certain = count;
    expected = 0;
  } else if (!decided()) {
    const std::vector<int64_t> units = selection.places(bucket);
    size_t unit = 0;
    while (unit + 1 < units.size() && certain + units[unit] < count) certain += units[unit++];
    cut.known = static_cast<int64_t>(unit) * UNIT;
    cut.open = cut.known + UNIT;
    expected = units[unit];
  }
  std::vector<uint64_t> candidates;
  const int64_t set = selection.mark(cut, expected, words, candidates);
  const int64_t missing = count - set;
  if (set != certain || static_cast<int64_t>(candidates.size()) != expected || missing > expected) Selection::changed();
  std::nth_element(candidates.begin(), candidates.begin() + missing, candidates.end());
  for (int64_t i = 0; i < missing; ++i) {
    const int64_t flat = static_cast<int64_t>(candidates[static_cast<size_t>(i)] & ((uint64_t{1} << 48) - 1));
    const int64_t row = flat / keys.columns, column = flat % keys.columns;
    words[row * row_words + column / 64] |= uint64_t{1} << (column % 64);
  }
}

}  // namespace offprin::cpu
