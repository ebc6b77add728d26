// Attention of one layer over pages, on a CPU: the keys of a row are read where they lie, once for all of its nodes
// and for all query heads that share them. Compiled at start (verifier/cpu/build.py) by g++ 12 or newer;
// the rule is that of verifier/torch/reference.py, sums are float32.
//
// Work is cut into items (segment, block of queries, some K/V heads side by side). Keys come in tiles of 64, whose rows
// hold all of the item's heads: the next tile is fetched from memory while this one is worked on, head by head. Of one
// head, the lines are the queries times the query heads that share it. Its keys are widened to float32 and transposed
// once for all lines, which multiply with them four at a time.
//
// A query's numbers do not depend on what else is in the step. A product of query and key sums over the dimension in
// order. Sums over keys go by their positions, in tiles that begin at multiples of 64: a node of a tree finds its
// ancestors among its siblings, and takes each one at the place where it would stand in a text.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "calls.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr int kTile = 64;
constexpr int kWritten = 64;  // places whose keys and values are stored at a time
constexpr int kKeys = 2 * kTile;  // most that a tree does not share with others: the rest of the last tile, and its nodes
constexpr int kParts = kWide / 4;  // vectors whose kTogether sums stay in registers
constexpr int kLines = 64;     // of an item, unless one query alone has more
constexpr int kTogether = 4;   // lines that share what is loaded
constexpr int kState = 1 << 18;  // most bytes of queries and sums of an item with several heads: they stay in the cache
constexpr int kMany = 4;         // blocks a thread, from which on they are not cut by heads to keep all threads busy
constexpr int kCacheLine = 64;
constexpr float kNone = -INFINITY;

// `size` numbers as float32 times `factor`, zeros behind them up to a multiple of kWide.
template <typename T>
void widen_row(const T* from, int size, float factor, float* to) {
  int done = 0;
  for (; done + kWide <= size; done += kWide) store(to + done, widen(from + done) * factor);
  if (done < size) {
    T rest[kWide] = {};
    std::memcpy(rest, from + done, sizeof(T) * (size - done));
    store(to + done, widen(rest) * factor);
  }
}

// One step of a transposition: the halves of pairs of `Half` columns change places.
template <int Half>
void exchange(Wide& one, Wide& other) {
  WideInt first{}, second{};
  for (int place = 0; place < kWide; place++) {
    first[place] = place & Half ? kWide + place - Half : place;
    second[place] = place & Half ? kWide + place : place + Half;
  }
  const Wide kept = __builtin_shuffle(one, other, first);
  other = __builtin_shuffle(one, other, second);
  one = kept;
}

template <int Half>
void exchange_all(Wide (&rows)[kWide]) {
  for (int row = 0; row < kWide; row++)
    if (!(row & Half)) exchange<Half>(rows[row], rows[row + Half]);
}

// A block of kWide rows, `from_stride` apart, to as many columns, `to_stride` apart.
void transpose(const float* from, int from_stride, float* to, int to_stride) {
  Wide rows[kWide];
  for (int row = 0; row < kWide; row++) rows[row] = load(from + row * from_stride);
  if constexpr (kWide == 16) exchange_all<8>(rows);
  exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
  for (int row = 0; row < kWide; row++) store(to + row * to_stride, rows[row]);
}

void narrow(float value, float& out) { out = value; }
void narrow(float value, Bfloat16& out) {  // to the nearest, ties to even; what is not a number stays that
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  out.bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

int padded(int size, int multiple) { return (size + multiple - 1) / multiple * multiple; }

// What one K/V head's lines have so far.
struct Lines {
  float *queries, *sums, *tops, *totals;  // [lines, k_wide], [lines, v_wide], [lines], [lines]
  int count;
};

// Scratch of one item. Owned by the thread.
struct Scratch {
  std::vector<float> queries, keys, columns, values, scores, sums, tops, totals;
  std::vector<int64_t> slots, next_slots;

  void fit(int heads, int lines, int k_wide, int v_wide) {
    most_ = padded(lines, kTogether), lines_ = lines, k_wide_ = k_wide, v_wide_ = v_wide;
    const size_t all = static_cast<size_t>(heads) * most_;
    queries.assign(all * k_wide, 0.0f);
    keys.resize(static_cast<size_t>(kTile) * k_wide);
    columns.resize(static_cast<size_t>(kTile) * k_wide);
    values.resize(static_cast<size_t>(kKeys) * v_wide);
    scores.resize(static_cast<size_t>(most_) * kKeys);
    sums.assign(all * v_wide, 0.0f);
    tops.assign(all, kNone);
    totals.assign(all, 0.0f);
    slots.resize(kKeys);
    next_slots.resize(kKeys);
  }

  Lines lines(int head) {
    const size_t first = static_cast<size_t>(head) * most_;
    return {&queries[first * k_wide_], &sums[first * v_wide_], &tops[first], &totals[first], lines_};
  }

 private:
  int most_, lines_, k_wide_, v_wide_;
};

struct Item {
  int segment, first, num_queries;  // `first` query within the segment
  int head, num_heads;              // K/V heads
};

// Scores [line][kKeys] of a tile's keys for lines from `line` on; those of keys that are not there are hidden later.
template <int Together>
void score_some(const Lines& lines, const Scratch& work, int line, int k_dim, int k_wide, float* scores) {
  const float* query = lines.queries + static_cast<size_t>(line) * k_wide;
  for (int part = 0; part < kTile; part += kParts * kWide) {
    Wide totals[Together][kParts] = {};
    for (int dim = 0; dim < k_dim; dim++) {
      const float* column = &work.columns[static_cast<size_t>(dim) * kTile + part];
      Wide keys[kParts];
      for (int place = 0; place < kParts; place++) keys[place] = load(column + place * kWide);
      for (int one = 0; one < Together; one++) {
        const Wide factor = spread(query[one * k_wide + dim]);
        for (int place = 0; place < kParts; place++) totals[one][place] = fused(factor, keys[place], totals[one][place]);
      }
    }
    for (int one = 0; one < Together; one++)
      for (int place = 0; place < kParts; place++)
        store(scores + static_cast<size_t>(line + one) * kKeys + part + place * kWide, totals[one][place]);
  }
}

void score(const Lines& lines, const Scratch& work, int k_dim, int k_wide, float* scores) {
  int line = 0;
  for (; line + 2 < lines.count; line += kTogether) score_some<kTogether>(lines, work, line, k_dim, k_wide, scores);
  for (; line < lines.count; line++) score_some<1>(lines, work, line, k_dim, k_wide, scores);
}

// sums[line] += weights[line] * values, `Together` lines and `Parts` vectors at a time.
template <int Together, int Parts>
void add_values(const Lines& lines, const Scratch& work, int line, int column, int count, int v_wide) {
  Wide totals[Together][Parts];
  for (int one = 0; one < Together; one++)
    for (int part = 0; part < Parts; part++)
      totals[one][part] = load(lines.sums + static_cast<size_t>(line + one) * v_wide + column + part * kWide);
  for (int key = 0; key < count; key++) {
    const float* row = &work.values[static_cast<size_t>(key) * v_wide + column];
    Wide values[Parts];
    for (int part = 0; part < Parts; part++) values[part] = load(row + part * kWide);
    for (int one = 0; one < Together; one++) {
      const Wide weight = spread(work.scores[static_cast<size_t>(line + one) * kKeys + key]);
      for (int part = 0; part < Parts; part++) totals[one][part] = fused(weight, values[part], totals[one][part]);
    }
  }
  for (int one = 0; one < Together; one++)
    for (int part = 0; part < Parts; part++)
      store(lines.sums + static_cast<size_t>(line + one) * v_wide + column + part * kWide, totals[one][part]);
}

template <int Together>
void weigh_some(const Lines& lines, const Scratch& work, int line, int count, int v_wide) {
  int column = 0;
  for (; column + kParts * kWide <= v_wide; column += kParts * kWide)
    add_values<Together, kParts>(lines, work, line, column, count, v_wide);
  for (; column < v_wide; column += kWide) add_values<Together, 1>(lines, work, line, column, count, v_wide);
}

void weigh_values(const Lines& lines, const Scratch& work, int count, int v_wide) {
  int line = 0;
  for (; line + 2 < lines.count; line += kTogether) weigh_some<kTogether>(lines, work, line, count, v_wide);
  for (; line < lines.count; line++) weigh_some<1>(lines, work, line, count, v_wide);
}

// The same for one line, whose weights [count] belong to the values at `places`.
template <int Parts>
void add_own(float* sums, const float* weights, const int* places, int count, const float* values, int v_wide) {
  Wide totals[Parts];
  for (int part = 0; part < Parts; part++) totals[part] = load(sums + part * kWide);
  for (int key = 0; key < count; key++) {
    const Wide weight = spread(weights[key]);
    const float* row = values + static_cast<size_t>(places[key]) * v_wide;
    for (int part = 0; part < Parts; part++) totals[part] = fused(weight, load(row + part * kWide), totals[part]);
  }
  for (int part = 0; part < Parts; part++) store(sums + part * kWide, totals[part]);
}

void weigh_own(float* sums, const float* weights, const int* places, int count, const float* values, int v_wide) {
  int column = 0;
  for (; column + 4 * kWide <= v_wide; column += 4 * kWide)
    add_own<4>(sums + column, weights, places, count, values + column, v_wide);
  for (; column < v_wide; column += kWide)
    add_own<1>(sums + column, weights, places, count, values + column, v_wide);
}

// Scores [kTile] to weights, and what was summed up before to the new maximum.
void soften(const Lines& lines, int line, float* scores, int v_wide) {
  Wide highest = load(scores);
  for (int key = kWide; key < kTile; key += kWide) {
    const Wide one = load(scores + key);
    highest = one > highest ? one : highest;
  }
  float top = lines.tops[line];
  for (int place = 0; place < kWide; place++) top = std::max(top, highest[place]);
  if (top == kNone) {  // nothing seen yet, or nothing that is a number
    for (int key = 0; key < kTile; key++)
      if (scores[key] != scores[key]) lines.totals[line] = scores[key];
    std::fill(scores, scores + kTile, 0.0f);
    return;
  }
  if (top > lines.tops[line]) {
    const float shrink = exponential(std::max(lines.tops[line] - top, -100.0f));
    float* sums = lines.sums + static_cast<size_t>(line) * v_wide;
    for (int column = 0; column < v_wide; column += kWide) store(sums + column, load(sums + column) * shrink);
    lines.totals[line] *= shrink;
    lines.tops[line] = top;
  }
  Wide total{};
  for (int key = 0; key < kTile; key += kWide) {
    const Wide weights = exponential(load(scores + key) - top);
    store(scores + key, weights);
    total += weights;
  }
  lines.totals[line] += sum(total);
}

void cap(float* scores, float softcap) {  // tanh from the exponential of what is not positive
  for (int key = 0; key < kTile; key += kWide) {
    const Wide x = load(scores + key) / softcap;
    const Wide power = exponential(x > 0.0f ? -2.0f * x : 2.0f * x);
    const Wide tanh = (1.0f - power) / (1.0f + power);
    store(scores + key, softcap * (x > 0.0f ? tanh : -tanh));
  }
}

template <typename T>
class Task {
 public:
  Task(const Step& step, const Layer& layer, const Inputs& inputs) : step_(step), layer_(layer), inputs_(inputs) {
    fold_ = layer.num_heads / layer.num_kv_heads;
    block_ = std::max(1, kLines / fold_);
    k_wide_ = padded(layer.k_dim, kWide);
    v_wide_ = padded(layer.v_dim, kWide);
    int num_blocks = 0;
    for (int segment = 0; segment < step.num_segments; segment++)
      num_blocks += (step.starts[segment + 1] - step.starts[segment] + block_ - 1) / block_;
    const int threads = step.num_threads;
    const int most_heads = num_blocks < kMany * threads ? (layer.num_kv_heads + threads - 1) / threads : layer.num_kv_heads;
    for (int segment = 0; segment < step.num_segments; segment++) {
      const int size = step.starts[segment + 1] - step.starts[segment];
      for (int first = size - 1 - (size - 1) % block_; first >= 0; first -= block_)  // the longest ones first
        cut(segment, first, std::min(block_, size - first), most_heads);
    }
  }

  void run() {
    const int num_places = step_.starts[step_.num_segments];
    team().run((num_places + kWritten - 1) / kWritten, step_.num_threads, [&](int64_t piece) {
      const int first = static_cast<int>(piece) * kWritten, last = std::min(num_places, first + kWritten);
      for (int place = first; place < last; place++) write(place);
    });
    team().run(static_cast<int64_t>(items_.size()), step_.num_threads, [&](int64_t index) {
      static thread_local Scratch work;
      attend(items_[index], work);
    });
  }

 private:
  // The items of a block of queries: as many heads at a time as the cache holds the state of.
  void cut(int segment, int first, int num_queries, int most_heads) {
    const int state = num_queries * fold_ * (k_wide_ + v_wide_) * static_cast<int>(sizeof(float));
    const int heads = std::max(1, std::min(most_heads, kState / state));
    for (int head = 0; head < layer_.num_kv_heads; head += heads)
      items_.push_back({segment, first, num_queries, head, std::min(heads, layer_.num_kv_heads - head)});
  }

  void write(int place) const {
    const int64_t slot = step_.write_slots[place];
    for (int head = 0; head < layer_.num_kv_heads; head++) {
      const int64_t at = slot * layer_.num_kv_heads + head;
      const T* key = static_cast<const T*>(inputs_.key) + head * inputs_.key_head + place * inputs_.key_place;
      const T* value = static_cast<const T*>(inputs_.value) + head * inputs_.value_head + place * inputs_.value_place;
      std::memcpy(static_cast<T*>(layer_.k) + at * layer_.k_dim, key, sizeof(T) * layer_.k_dim);
      std::memcpy(static_cast<T*>(layer_.v) + at * layer_.v_dim, value, sizeof(T) * layer_.v_dim);
    }
  }

  void attend(const Item& item, Scratch& work) const {
    const int start = step_.starts[item.segment], prefix = step_.prefix_lens[item.segment];
    const bool is_tree = item.segment < step_.num_trees;
    const int stop = prefix + (is_tree ? step_.starts[item.segment + 1] - start : item.first + item.num_queries);
    const int shared = is_tree ? prefix / kTile * kTile : stop;  // what is behind is each node's own
    int lowest = shared;
    for (int query = 0; query < item.num_queries; query++) lowest = std::min(lowest, first_key(item, query));
    int key = lowest / kTile * kTile, count = std::min(kTile, stop - key);
    work.fit(item.num_heads, item.num_queries * fold_, k_wide_, v_wide_);
    find_slots(item, key, count, work.slots);
    fetch(item, work.slots, 0, count);
    for (int head = 0; head < item.num_heads; head++) take_queries(item, head, work.lines(head));
    while (key < shared) {
      const int next_count = std::max(0, std::min(kTile, stop - key - kTile));
      find_slots(item, key + kTile, next_count, work.next_slots);
      for (int head = 0; head < item.num_heads; head++) {
        fetch(item, work.next_slots, next_count * head / item.num_heads, next_count * (head + 1) / item.num_heads);
        attend_tile(item, head, key, count, work);
      }
      std::swap(work.slots, work.next_slots);
      key += kTile, count = next_count;
    }
    if (is_tree) {
      find_slots(item, shared, stop - shared, work.slots);
      fetch(item, work.slots, std::min(kTile, stop - shared), stop - shared);
      for (int head = 0; head < item.num_heads; head++) attend_own(item, head, shared, stop - shared, work);
    }
    for (int head = 0; head < item.num_heads; head++) give(item, head, work.lines(head));
  }

  // What the keys [key, key + count) add for one of the item's heads.
  void attend_tile(const Item& item, int head, int key, int count, Scratch& work) const {
    const Lines lines = work.lines(head);
    take_keys(item.head + head, 0, count, work);
    score(lines, work, layer_.k_dim, k_wide_, work.scores.data());
    const bool is_whole =
        count == kTile && key + kTile <= step_.prefix_lens[item.segment] && layer_.window == INT32_MAX;
    for (int line = 0; line < lines.count; line++) {
      float* scores = &work.scores[static_cast<size_t>(line) * kKeys];
      if (layer_.softcap > 0.0f) cap(scores, layer_.softcap);
      if (!is_whole) hide(item, line / fold_, key, scores);
      soften(lines, line, scores, v_wide_);
    }
    take_values(item.head + head, count, work);
    weigh_values(lines, work, count, v_wide_);
  }

  // The same for the keys [key, key + count) of a tree's last tiles, of which each node sees those of its own text.
  void attend_own(const Item& item, int head, int key, int count, Scratch& work) const {
    const Lines lines = work.lines(head);
    for (int first = 0; first < count; first += kTile) {
      take_keys(item.head + head, first, std::min(kTile, count - first), work);
      score(lines, work, layer_.k_dim, k_wide_, work.scores.data() + first);
    }
    take_values(item.head + head, count, work);
    const int num_cached = step_.prefix_lens[item.segment] - key;
    int places[kKeys], num_seen = 0;
    for (int place = 0; place < num_cached; place++) places[place] = place;
    for (int line = 0; line < lines.count; line++) {
      const int query = line / fold_, first = first_key(item, query) - key;
      if (line % fold_ == 0) {
        num_seen = num_cached;
        uint64_t bits = step_.ancestors[step_.starts[item.segment] + item.first + query];
        for (; bits != 0; bits &= bits - 1) places[num_seen++] = num_cached + __builtin_ctzll(bits);
      }
      float* found = &work.scores[static_cast<size_t>(line) * kKeys];
      if (layer_.softcap > 0.0f)
        for (int tile = 0; tile < kKeys; tile += kTile) cap(found + tile, layer_.softcap);
      for (int tile = 0; tile < num_seen; tile += kTile) {
        const int here = std::min(kTile, num_seen - tile);
        float scores[kTile];
        for (int place = 0; place < kTile; place++)
          scores[place] = place < here && tile + place >= first ? found[places[tile + place]] : kNone;
        soften(lines, line, scores, v_wide_);
        weigh_own(lines.sums + static_cast<size_t>(line) * v_wide_, scores, places + tile, here, work.values.data(),
                  v_wide_);
      }
    }
  }

  int first_key(const Item& item, int query) const {
    const int place = step_.starts[item.segment] + item.first + query;
    const int64_t position = step_.prefix_lens[item.segment] + step_.depths[place];
    return static_cast<int>(std::max<int64_t>(0, position - layer_.window + 1));
  }

  // Minus infinity for those of a tile's keys that the query does not see; what is behind the last key is behind it too.
  void hide(const Item& item, int query, int key, float* scores) const {
    const int first = first_key(item, query);
    const int last = step_.prefix_lens[item.segment] + step_.depths[step_.starts[item.segment] + item.first + query];
    for (int place = 0; place < kTile; place++)
      if (key + place < first || key + place > last) scores[place] = kNone;
  }

  void find_slots(const Item& item, int key, int count, std::vector<int64_t>& slots) const {
    const int32_t* pages = step_.page_table + static_cast<int64_t>(step_.rows[item.segment]) * step_.pages_per_row;
    int page = key / step_.page_size, inside = key % step_.page_size;
    for (int place = 0; place < count; place++) {
      slots[place] = static_cast<int64_t>(pages[page]) * step_.page_size + inside;
      if (++inside == step_.page_size) inside = 0, page++;
    }
  }

  // Ask the memory for the rows of the keys [begin, end) of a tile.
  void fetch(const Item& item, const std::vector<int64_t>& slots, int begin, int end) const {
    for (int key = begin; key < end; key++) {
      fetch_row(row(layer_.k, slots[key], item.head, layer_.k_dim), item.num_heads * layer_.k_dim);
      fetch_row(row(layer_.v, slots[key], item.head, layer_.v_dim), item.num_heads * layer_.v_dim);
    }
  }

  // Loads, as hints to prefetch did not help: in address order they set off the hardware's own.
  static void fetch_row(const T* from, int size) {
    const volatile char* first = reinterpret_cast<const volatile char*>(from);
    const volatile char* last = reinterpret_cast<const volatile char*>(from + size) - 1;
    for (const volatile char* at = first; at < last; at += kCacheLine) (void)*at;
    (void)*last;
  }

  void take_queries(const Item& item, int head, const Lines& lines) const {
    for (int query = 0; query < item.num_queries; query++) {
      const int64_t place = step_.starts[item.segment] + item.first + query;
      for (int one = 0; one < fold_; one++) {
        const T* from = static_cast<const T*>(inputs_.query) +
                        ((item.head + head) * fold_ + one) * inputs_.query_head + place * inputs_.query_place;
        float* to = lines.queries + static_cast<size_t>(query * fold_ + one) * k_wide_;
        widen_row(from, layer_.k_dim, layer_.scaling, to);
      }
    }
  }

  const T* row(const void* pool, int64_t slot, int head, int dim) const {
    return static_cast<const T*>(pool) + (slot * layer_.num_kv_heads + head) * dim;
  }

  // The keys in `count` slots from `first` on, as columns [k_dim][kTile].
  void take_keys(int head, int first, int count, Scratch& work) const {
    for (int key = 0; key < count; key++)
      widen_row(row(layer_.k, work.slots[first + key], head, layer_.k_dim), layer_.k_dim, 1.0f,
                &work.keys[static_cast<size_t>(key) * k_wide_]);
    for (int key = 0; key < count; key += kWide)
      for (int dim = 0; dim < k_wide_; dim += kWide)
        transpose(&work.keys[static_cast<size_t>(key) * k_wide_ + dim], k_wide_,
                  &work.columns[static_cast<size_t>(dim) * kTile + key], kTile);
  }

  void take_values(int head, int count, Scratch& work) const {
    for (int key = 0; key < count; key++)
      widen_row(row(layer_.v, work.slots[key], head, layer_.v_dim), layer_.v_dim, 1.0f,
                &work.values[static_cast<size_t>(key) * v_wide_]);
  }

  void give(const Item& item, int kv_head, const Lines& lines) const {
    for (int line = 0; line < lines.count; line++) {
      const int64_t place = step_.starts[item.segment] + item.first + line / fold_;
      const int head = (item.head + kv_head) * fold_ + line % fold_;
      float scale = 1.0f, total = lines.totals[line];
      if (inputs_.sinks != nullptr && total == total) {
        const float top = std::max(lines.tops[line], inputs_.sinks[head]);
        scale = std::exp(lines.tops[line] - top);
        total = total * scale + std::exp(inputs_.sinks[head] - top);
      }
      T* to = static_cast<T*>(inputs_.out) + (place * layer_.num_heads + head) * layer_.v_dim;
      const float* from = lines.sums + static_cast<size_t>(line) * v_wide_;
      for (int dim = 0; dim < layer_.v_dim; dim++) narrow(from[dim] * scale / total, to[dim]);
    }
  }

  const Step& step_;
  const Layer& layer_;
  const Inputs& inputs_;
  int fold_, block_, k_wide_, v_wide_;
  std::vector<Item> items_;
};

}  // namespace

extern "C" {

void attend_float32(const Step* step, const Layer* layer, const Inputs* inputs) {
  Task<float>(*step, *layer, *inputs).run();
}

void attend_bfloat16(const Step* step, const Layer* layer, const Inputs* inputs) {
  Task<Bfloat16>(*step, *layer, *inputs).run();
}

void attend_float16(const Step* step, const Layer* layer, const Inputs* inputs) {
  Task<Float16>(*step, *layer, *inputs).run();
}
}
