// Where the keys, or the values, of one entry and key head lie: in a row of memory or in pages.
#pragma once

#include "cpu/attention/decode/params.h"
#include "cpu/vec.h"

namespace gk::cpu::GK_ISA {
namespace {

template <class T>
class Cache {
  public:
    Cache(const AttentionDecode& p, const void* at, const Strides& strides, int64_t b,
          int64_t hk)
        : at_(static_cast<const T*>(at) + hk * strides.head), strides_(strides) {
        if (p.block_table == nullptr) {
            at_ += b * strides.batch;
        } else {
            pages_ = p.block_table + b * p.pages;
            page_ = p.page;
            cache_pages_ = p.cache_pages;
        }
    }

    // The rows of the kWidth keys from j on. A key before `first` counts as `first`, and one from
    // `last` on as the last one: neither may be read, and nobody sees what stands in their place.
    void rows(int64_t j, int64_t first, int64_t last, const T** to) const {
        const int64_t begin = j < first ? first : j;
        const int64_t end = j + kWidth < last ? j + kWidth : last;
        if (pages_ == nullptr) {
            const T* row = at_ + begin * strides_.token;
            for (int64_t i = begin; i < end; ++i, row += strides_.token) to[i - j] = row;
        } else {
            int64_t number = begin / page_, place = begin % page_;
            const T* page = page_at(number);
            for (int64_t i = begin; i < end; ++i) {
                to[i - j] = page + place * strides_.token;
                if (++place == page_ && i + 1 < end) {
                    page = page_at(++number);
                    place = 0;
                }
            }
        }
        for (int64_t i = j; i < begin; ++i) to[i - j] = to[begin - j];
        for (int64_t i = end; i < j + kWidth; ++i) to[i - j] = to[end - 1 - j];
    }

  private:
    const T* page_at(int64_t number) const {
        int64_t page = pages_[number];
        page = page < 0 ? 0 : page;
        page = page < cache_pages_ ? page : cache_pages_ - 1;
        return at_ + page * strides_.batch;
    }

    const T* at_;
    Strides strides_;
    const int32_t* pages_ = nullptr;
    int64_t page_ = 0, cache_pages_ = 0;
};

}  // namespace
}  // namespace gk::cpu::GK_ISA
