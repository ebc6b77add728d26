// What is passed between our C++ and those that call it, and the calls that one file makes of another.

#pragma once

#include <cstdint>

// What is the same for all layers of a step: see verifier/step.py. Trees come before chunks.
struct Step {
  const int32_t* starts;       // [segments + 1]
  const int32_t* rows;         // [segments]
  const int32_t* prefix_lens;  // [segments]
  const int32_t* depths;       // [N]
  const int64_t* ancestors;    // [N]
  const int64_t* write_slots;  // [N]
  const int32_t* page_table;   // [M, pages_per_row]
  int32_t num_segments, num_trees, page_size, pages_per_row, num_threads;
};

struct Layer {
  void *k, *v;  // [slots, kv_heads, dim]
  int32_t num_heads, num_kv_heads, k_dim, v_dim, window;
  float scaling, softcap;  // a soft-cap of 0 is none
};

// Strides in elements; the last dimension is dense.
struct Inputs {
  const void *query, *key, *value;  // [heads, N, dim]
  int64_t query_head, query_place, key_head, key_place, value_head, value_place;
  const float* sinks;  // [heads] or null
  void* out;           // [N, heads, v_dim]
};

struct Sizes {
  int64_t rows, outputs, width, stride;  // stride of the rows of x, in numbers
};

struct Heads {
  int64_t places, heads, width, head_stride, place_stride;
};

struct Matrix {
  const void* weight;  // as products.cpp packs it
  const void* bias;    // [outputs] or null
  int64_t outputs, width;
};

struct Norm {
  const float* weight;
  float eps;
  int32_t is_early;
};

struct Decoder {
  Matrix heads, out, gates, down;  // queries, keys and values side by side; gate and up
  Norm first, second, query, key;  // the last two have no weight where heads are not normed
  const Layer* attention;
  int32_t activation;
};

extern "C" {
void attend_float32(const Step* step, const Layer* layer, const Inputs* inputs);
void attend_bfloat16(const Step* step, const Layer* layer, const Inputs* inputs);
void multiply_float32(const float* weight, const float* x, const Sizes* sizes, float* out, int num_threads);
void multiply_bfloat16(const uint16_t* weight, const uint16_t* x, const Sizes* sizes, uint16_t* out, int num_threads);
}
