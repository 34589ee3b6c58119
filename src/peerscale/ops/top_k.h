// The best k of n values for many sets of values at once, one a lane of the processor's vectors.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

namespace peerscale {

using Exchanges = std::pair<int, int>;  // places to compare, the better of the two to the first

constexpr int log2(int size) { return size == 1 ? 0 : 1 + log2(size / 2); }

// Batcher's odd-even merge sort.
template <int kSize>
struct SortNetwork {
  static constexpr int kLog = log2(kSize), kCount = (kLog * kLog - kLog + 4) * kSize / 4 - 1;
  static constexpr std::array<Exchanges, kCount> make() {
    std::array<Exchanges, kCount> all{};
    int n = 0;
    for (int p = 1; p < kSize; p *= 2)
      for (int d = p; d >= 1; d /= 2)
        for (int j = d % p; j + d < kSize; j += 2 * d)
          for (int i = j; i < j + d && i + d < kSize; ++i)
            if (i / (2 * p) == (i + d) / (2 * p)) all[n].first = i, all[n].second = i + d, ++n;
    return all;
  }
  static constexpr std::array<Exchanges, kCount> kExchanges = make();
};

// Sorts what first rises and then falls.
template <int kSize>
struct MergeNetwork {
  static constexpr int kCount = kSize / 2 * log2(kSize);
  static constexpr std::array<Exchanges, kCount> make() {
    std::array<Exchanges, kCount> all{};
    int n = 0;
    for (int d = kSize / 2; d >= 1; d /= 2)
      for (int i = 0; i < kSize; ++i)
        if (!(i & d)) all[n].first = i, all[n].second = i + d, ++n;
    return all;
  }
  static constexpr std::array<Exchanges, kCount> kExchanges = make();
};

// Sorting networks compare the same places whatever the values are, so that a vector sorts a set in each of its lanes.
// A set costs some (n / k) log(k)^2 comparisons: less than to look at it by itself as long as n is a few times k.
// Best first, `kSize` of them; the order of equal ones depends on their set alone. Memory-safe, if meaningless, for NaN.
template <class Real, int kSize>
class TopK {
 public:
  using Int = std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t>;
  typedef Real Values __attribute__((vector_size(64)));
  typedef Int Indices __attribute__((vector_size(64)));
  static constexpr std::int64_t kLanes = sizeof(Values) / sizeof(Real);
  struct Item {
    Values value;
    Indices index;
  };

  // `fill(start, count, to)` writes the items from the start-th on; `sorted` of the first ones are known to be so.
  template <class Fill>
  const Item* operator()(std::int64_t n, std::int64_t sorted, Fill fill) {
    for (std::int64_t start = 0; start < n; start += kSize) {
      Item* to = start ? block_ : best_;
      const std::int64_t count = std::min<std::int64_t>(kSize, n - start);
      fill(start, count, to);
      std::fill(to + count, to + kSize, Item{Values{} - std::numeric_limits<Real>::infinity(), Indices{}});
      if (start + count > sorted) sort(to);
      if (start) merge(best_, block_);
    }
    return best_;
  }

 private:
  Item best_[kSize], block_[kSize];

  static void exchange(Item& a, Item& b) {
    const auto swap = b.value > a.value;
    const Item first{swap ? b.value : a.value, swap ? b.index : a.index};
    const Item second{swap ? a.value : b.value, swap ? a.index : b.index};
    a = first, b = second;
  }
  // Unrolled, on a copy, so that items live in registers.
  template <class Network, std::size_t... I>
  static void run(Item* items, std::index_sequence<I...>) {
    (exchange(items[Network::kExchanges[I].first], items[Network::kExchanges[I].second]), ...);
  }
  template <class Network>
  static void run(Item* items) {
    run<Network>(items, std::make_index_sequence<Network::kCount>());
  }
  static __attribute__((noinline)) void sort(Item* items) {
    Item local[kSize];
    std::copy_n(items, kSize, local);
    run<SortNetwork<kSize>>(local);
    std::copy_n(local, kSize, items);
  }
  static __attribute__((noinline)) void merge(Item* best, Item* block) {
    Item local[kSize];
    for (int i = 0; i < kSize; ++i) {
      local[i] = best[i];
      exchange(local[i], block[kSize - 1 - i]);
    }
    run<MergeNetwork<kSize>>(local);
    std::copy_n(local, kSize, best);
  }
};

}  // namespace peerscale
