// The best k of n values for many sets of values at once, one a lane of the processor's vectors.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

// Sorting networks compare the same places whatever the values are, so that a vector sorts a set in each of its lanes.
// A set costs some (n / k) log(k)^2 comparisons: less than to look at it by itself as long as n is a few times k.
// Best first; the order of equal ones depends on their set alone. Memory-safe, if meaningless, for NaN.
template <class Real>
class TopKLanes {
 public:
  using Int = std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t>;
  typedef Real Values __attribute__((vector_size(64)));
  typedef Int Indices __attribute__((vector_size(64)));
  static constexpr std::int64_t kLanes = sizeof(Values) / sizeof(Real);
  struct Item {
    Values value;
    Indices index;
  };

  explicit TopKLanes(std::int64_t k) {
    while (size_ < k) size_ *= 2;
    for (int p = 1; p < size_; p *= 2)  // Batcher's odd-even merge sort
      for (int d = p; d >= 1; d /= 2)
        for (int j = d % p; j + d < size_; j += 2 * d)
          for (int i = j; i < j + d && i + d < size_; ++i)
            if (i / (2 * p) == (i + d) / (2 * p)) sort_.emplace_back(i, i + d);
    for (int d = size_ / 2; d >= 1; d /= 2)  // sorts what first rises and then falls
      for (int i = 0; i < size_; ++i)
        if (!(i & d)) merge_.emplace_back(i, i + d);
    best_.resize(size_), block_.resize(size_);
  }

  // The items come from `item(i)`, i < n; `sorted` of the first ones are known to be so. Returns the best k.
  template <class Get>
  const Item* operator()(std::int64_t n, std::int64_t sorted, Get item) {
    for (std::int64_t start = 0; start < n; start += size_) {
      std::vector<Item>& to = start ? block_ : best_;
      for (int i = 0; i < size_; ++i)
        to[i] = start + i < n ? item(start + i) : Item{Values{} - std::numeric_limits<Real>::infinity(), Indices{}};
      if (std::min(start + size_, n) > sorted) run(sort_, to.data());
      if (!start) continue;
      for (int i = 0; i < size_; ++i) exchange(best_[i], block_[size_ - 1 - i]);
      run(merge_, best_.data());
    }
    return best_.data();
  }

 private:
  using Network = std::vector<std::pair<int, int>>;
  int size_ = 1;
  Network sort_, merge_;
  std::vector<Item> best_, block_;

  static void exchange(Item& a, Item& b) {
    const auto swap = b.value > a.value;
    const Item first{swap ? b.value : a.value, swap ? b.index : a.index};
    const Item second{swap ? a.value : b.value, swap ? a.index : b.index};
    a = first, b = second;
  }
  static void run(const Network& network, Item* items) {
    for (const auto& [i, j] : network) exchange(items[i], items[j]);
  }
};
