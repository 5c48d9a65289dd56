// Causal attention in bfloat16 for CPUs with AVX512-BF16, forward and backward: the algorithm of FlashAttention-2
// (Dao 2023, https://arxiv.org/abs/2307.08691).  Scores, softmax and sums are in fp32; operands of products are rounded
// to bfloat16.  The matrix of all scores is never made, and a block without a visible pair is not computed.
//
// A query sees the keys from `first[query]`, which never falls along a row, to its own; without `first`, from 0.

#include "bf16_products.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

// Blocks of queries and keys: multiples of ROWS on the side of the rows, of PANEL on the other.
constexpr int QUERIES = 48, KEYS = 256;
constexpr int BACKWARD_KEYS = 96, BACKWARD_QUERIES = 128;

// --- memory ---------------------------------------------------------------------------------------------------------

// A thread's memory, handed out in pieces of whole cache lines.  With a null pointer it only counts the bytes.
struct Arena {
    char *memory;
    int64_t used = 0;
    template <typename T>
    T *take(int64_t count) {
        T *place = reinterpret_cast<T *>(memory + used);
        used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return place;
    }
};

struct ForwardMemory {
    uint32_t *keys, *values;  // packed
    float *scores, *sums;
    bf16 *weights;
    ForwardMemory(Arena &arena, int64_t length, int size)
        : keys(arena.take<uint32_t>(round_up(length, KEYS) / 2 * size)),
          values(arena.take<uint32_t>(round_up(length, KEYS) / 2 * round_up(size, PANEL))),
          scores(arena.take<float>(ROWS * KEYS)),
          sums(arena.take<float>(QUERIES * size)),
          weights(arena.take<bf16>(ROWS * KEYS)) {}
};

struct BackwardMemory {
    int64_t length;  // rounded up to whole blocks
    int64_t across;  // row length of transposed matrices: no multiple of a page, where rows would share cache sets
    uint32_t *query_columns, *query_rows, *grad_columns, *grad_rows;  // packed
    bf16 *keys_across;
    float *query_grads_across, *key_grads, *value_grads;
    float *shift, *delta;
    int32_t *first;
    float *scores, *weight_grads;
    bf16 *weights, *score_grads;    // (keys, queries) of a block
    uint32_t *score_grad_pairs;     // the same, packed
    BackwardMemory(Arena &arena, int64_t tokens, int size)
        : length(round_up(tokens, BACKWARD_QUERIES)),
          across(round_up(tokens, BACKWARD_QUERIES) + 32),
          query_columns(arena.take<uint32_t>(length / 2 * size)),
          query_rows(arena.take<uint32_t>(length / 2 * round_up(size, PANEL))),
          grad_columns(arena.take<uint32_t>(length / 2 * size)),
          grad_rows(arena.take<uint32_t>(length / 2 * round_up(size, PANEL))),
          keys_across(arena.take<bf16>(across * size)),
          query_grads_across(arena.take<float>(across * size)),
          key_grads(arena.take<float>(tokens * size)),
          value_grads(arena.take<float>(tokens * size)),
          shift(arena.take<float>(length)),
          delta(arena.take<float>(length)),
          first(arena.take<int32_t>(length)),
          scores(arena.take<float>(ROWS * BACKWARD_QUERIES)),
          weight_grads(arena.take<float>(ROWS * BACKWARD_QUERIES)),
          weights(arena.take<bf16>(BACKWARD_KEYS * BACKWARD_QUERIES)),
          score_grads(arena.take<bf16>(BACKWARD_KEYS * BACKWARD_QUERIES)),
          score_grad_pairs(arena.take<uint32_t>(BACKWARD_KEYS / 2 * BACKWARD_QUERIES)) {}
};

// --- forward --------------------------------------------------------------------------------------------------------

// The softmax's running state of a block of queries, base 2.
struct Softmax {
    float largest[QUERIES], total[QUERIES];
};

// Turn the scores of one query and `count` keys from key `begin` on into weights; earlier sums are scaled down.
void weigh(float *scores, int count, int64_t begin, int64_t first, int64_t query, float factor, float &largest,
           float &total, bool is_later, float *sums, int size, bf16 *weights) {
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (int j = 0; j < count; j += LANES) {
        const __mmask16 seen = before(begin + j, query + 1) & ~before(begin + j, first);
        const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(factor));
        const __m512 masked = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, score);
        _mm512_storeu_ps(scores + j, masked);
        top = _mm512_max_ps(top, masked);
    }
    const float now = std::max(largest, _mm512_reduce_max_ps(top));
    const __m512 shift = _mm512_set1_ps(now == -INFINITY ? 0.0f : now);  // the query may see no key of this block
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < count; j += LANES) {
        const __m512 weight = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores + j), shift));
        sum = _mm512_add_ps(sum, weight);
        store(weights + j, rounded(weight));
    }
    const float scale = largest == -INFINITY ? 0.0f : std::exp2(largest - now);
    total = total * scale + _mm512_reduce_add_ps(sum);
    largest = now;
    if (is_later && scale != 1.0f)
        for (int j = 0; j < size; j += LANES)
            _mm512_storeu_ps(sums + j, _mm512_mul_ps(_mm512_loadu_ps(sums + j), _mm512_set1_ps(scale)));
}

// Compute queries `begin` to `end` of one head.  `lse`: for each query the base-2 logarithm of its sum of weights.
void forward(Arena arena, Matrix queries, Matrix keys, Matrix values, Matrix out, float *lse, const int32_t *first,
             int64_t begin, int64_t end, int size, float scale) {
    const int64_t padded = round_up(end, KEYS);
    ForwardMemory memory(arena, end, size);
    pack_as_columns(keys, end, size, memory.keys);
    pack_as_rows(values, end, padded, size, memory.values);
    for (int64_t q0 = begin; q0 < end; q0 += QUERIES) {
        const int64_t q1 = std::min<int64_t>(q0 + QUERIES, end);
        Softmax softmax;
        std::fill_n(softmax.largest, QUERIES, -INFINITY);
        std::fill_n(softmax.total, QUERIES, 0.0f);
        const int64_t from = first ? first[q0] / KEYS * KEYS : 0;
        for (int64_t k0 = from; k0 < q1; k0 += KEYS)
            for (int64_t query = q0; query < q1; query += ROWS) {
                const int rows = static_cast<int>(std::min<int64_t>(ROWS, q1 - query));
                if (k0 >= query + rows) continue;
                const int count = static_cast<int>(std::min<int64_t>(KEYS, round_up(query + rows - k0, LANES)));
                product(rows, 0, count, queries.row(query), queries.stride, memory.keys + k0 * (size / 2),
                        PANEL * (size / 2), size / 2, memory.scores, KEYS, false);
                for (int r = 0; r < rows; r++) {
                    const int64_t i = query + r - q0;
                    weigh(memory.scores + r * KEYS, count, k0, first ? first[query + r] : 0, query + r, scale * LOG2E,
                          softmax.largest[i], softmax.total[i], k0 > from, memory.sums + i * size, size,
                          memory.weights + r * KEYS);
                }
                product(rows, 0, size, memory.weights, KEYS, memory.values + k0 / 2 * PANEL, padded / 2 * PANEL,
                        count / 2, memory.sums + (query - q0) * size, size, k0 > from);
            }
        for (int64_t i = 0; i < q1 - q0; i++) {
            const __m512 by = _mm512_set1_ps(1.0f / softmax.total[i]);
            for (int j = 0; j < size; j += LANES)
                store(out.row(q0 + i) + j, rounded(_mm512_mul_ps(_mm512_loadu_ps(memory.sums + i * size + j), by)));
            lse[q0 + i] = softmax.largest[i] + std::log2(softmax.total[i]);
        }
    }
}

// --- backward -------------------------------------------------------------------------------------------------------

// Compute the weights and the gradients of the scores for a tile of keys from `key` on and the queries from `q0` on,
// columns `begin` to `end`.  The tile begins at row `row` of the block.
void backward_weights(const BackwardMemory &memory, int rows, int row, int64_t key, int64_t q0, int begin, int end,
                      bool has_first, float factor) {
    for (int r = 0; r < rows; r += 2)  // an odd number of keys computes one row more, which is never read
        for (int j = begin; j < end; j += LANES) {
            const __m512 shift = _mm512_loadu_ps(memory.shift + q0 + j), delta = _mm512_loadu_ps(memory.delta + q0 + j);
            __m512i units[2];
            for (int odd = 0; odd < 2; odd++) {
                const int64_t own = key + r + odd;
                const int at = (r + odd) * BACKWARD_QUERIES + j, to = (row + r + odd) * BACKWARD_QUERIES + j;
                __mmask16 seen = r + odd < rows ? ~before(q0 + j, own) : 0;
                if (has_first)
                    seen &= _mm512_cmple_epi32_mask(_mm512_loadu_si512(memory.first + q0 + j),
                                                    _mm512_set1_epi32(static_cast<int>(own)));
                const __m512 score = _mm512_maskz_loadu_ps(seen, memory.scores + at);
                const __m512 grad = _mm512_maskz_loadu_ps(seen, memory.weight_grads + at);
                const __m512 weight = _mm512_maskz_mov_ps(
                    seen, exp2_of(_mm512_fmsub_ps(score, _mm512_set1_ps(factor), shift)));
                const __m256i score_grad = rounded(_mm512_mul_ps(weight, _mm512_sub_ps(grad, delta)));
                store(memory.weights + to, rounded(weight));
                store(memory.score_grads + to, score_grad);
                units[odd] = units_of(score_grad);
            }
            _mm512_storeu_si512(memory.score_grad_pairs + j / PANEL * PANEL * (BACKWARD_KEYS / 2) +
                                    (row + r) / 2 * PANEL + j % PANEL,
                                _mm512_or_si512(units[0], _mm512_slli_epi32(units[1], 16)));
        }
}

// Differentiate one head of queries.  Gradients of keys and values are added to those in `memory`; that of the
// queries is written anew.
void backward(const BackwardMemory &memory, Matrix queries, Matrix keys, Matrix values, Matrix out, Matrix grad,
              const float *lse, const int32_t *first, int64_t tokens, int size, float scale) {
    pack_as_columns(queries, tokens, size, memory.query_columns);
    pack_as_rows(queries, tokens, memory.length, size, memory.query_rows);
    pack_as_columns(grad, tokens, size, memory.grad_columns);
    pack_as_rows(grad, tokens, memory.length, size, memory.grad_rows);
    for (int64_t i = 0; i < memory.length; i++) {
        __m512 sum = _mm512_setzero_ps();
        for (int j = 0; i < tokens && j < size; j += LANES)
            sum = _mm512_fmadd_ps(floats_of(load(grad.row(i) + j)), floats_of(load(out.row(i) + j)), sum);
        memory.delta[i] = _mm512_reduce_add_ps(sum);
        memory.shift[i] = i < tokens ? lse[i] : 1e30f;  // the weights of queries past the end are 0
        memory.first[i] = i < tokens && first ? first[i] : 0;
    }
    std::fill_n(memory.query_grads_across, memory.across * size, 0.0f);
    for (int64_t k0 = 0; k0 < tokens; k0 += BACKWARD_KEYS) {
        const int count = static_cast<int>(std::min<int64_t>(BACKWARD_KEYS, tokens - k0));
        for (int64_t q0 = k0 / BACKWARD_QUERIES * BACKWARD_QUERIES; q0 < tokens; q0 += BACKWARD_QUERIES) {
            if (first && first[q0] >= k0 + count) break;  // later queries do not see these keys either
            const int begin = static_cast<int>(std::max<int64_t>(k0 - q0, 0) / LANES * LANES);
            const int end = static_cast<int>(std::min<int64_t>(BACKWARD_QUERIES, round_up(tokens - q0, LANES)));
            for (int row = 0; row < count; row += ROWS) {
                const int rows = std::min(ROWS, count - row);
                product(rows, begin, end, keys.row(k0 + row), keys.stride, memory.query_columns + q0 * (size / 2),
                        PANEL * (size / 2), size / 2, memory.scores, BACKWARD_QUERIES, false);
                product(rows, begin, end, values.row(k0 + row), values.stride, memory.grad_columns + q0 * (size / 2),
                        PANEL * (size / 2), size / 2, memory.weight_grads, BACKWARD_QUERIES, false);
                backward_weights(memory, rows, row, k0 + row, q0, begin, end, first, scale * LOG2E);
            }
            const int64_t panel = memory.length / 2 * PANEL, from = (q0 + begin) / 2 * PANEL;
            for (int row = 0; row < count; row += ROWS) {
                const int rows = std::min(ROWS, count - row), at = row * BACKWARD_QUERIES + begin;
                const int64_t to = (k0 + row) * size;
                product(rows, 0, size, memory.weights + at, BACKWARD_QUERIES, memory.grad_rows + from, panel,
                        (end - begin) / 2, memory.value_grads + to, size, true);
                product(rows, 0, size, memory.score_grads + at, BACKWARD_QUERIES, memory.query_rows + from, panel,
                        (end - begin) / 2, memory.key_grads + to, size, true);
            }
            for (int row = 0; row < size; row += ROWS)
                product(std::min(ROWS, size - row), begin, end, memory.keys_across + row * memory.across + k0,
                        memory.across, memory.score_grad_pairs, PANEL * (BACKWARD_KEYS / 2), (count + 1) / 2,
                        memory.query_grads_across + row * memory.across + q0, memory.across, true);
        }
    }
}

void store_rows(const float *from, int64_t rows, int size, float scale, Matrix to) {
    for (int64_t row = 0; row < rows; row++)
        for (int j = 0; j < size; j += LANES)
            store(to.row(row) + j,
                  rounded(_mm512_mul_ps(_mm512_loadu_ps(from + row * size + j), _mm512_set1_ps(scale))));
}

void store_transposed(const float *from, int64_t stride, int64_t rows, int size, float scale, Matrix to) {
    const __m512i offsets = multiples_of(stride * static_cast<int64_t>(sizeof(float)));
    for (int64_t row = 0; row < rows; row++)
        for (int j = 0; j < size; j += LANES)
            store(to.row(row) + j, rounded(_mm512_mul_ps(_mm512_i32gather_ps(offsets, from + j * stride + row, 1),
                                                         _mm512_set1_ps(scale))));
}

// --- whole tensors --------------------------------------------------------------------------------------------------

// A tensor (batch, heads, tokens, size), the numbers of a token contiguous.
struct Tensor {
    bf16 *data;
    const int64_t *strides;  // of batch, head, token
    Matrix head(int64_t batch, int64_t head) const {
        return {data + batch * strides[0] + head * strides[1], strides[2]};
    }
};

}  // namespace

extern "C" {

// Bytes of working memory that one thread needs.
int64_t causal_attention_memory(int64_t tokens, int64_t size, int backward) {
    Arena arena{nullptr};
    if (backward)
        BackwardMemory(arena, tokens, static_cast<int>(size));
    else
        ForwardMemory(arena, tokens, static_cast<int>(size));
    return arena.used;
}

// `tensors`: queries, keys, values, out.  `shape`: batch, heads, heads of keys, tokens, size.
void causal_attention_forward(bf16 *const *tensors, const int64_t *strides, const int64_t *shape, float *lse,
                              const int32_t *first, float scale, char *memory, int threads) {
    const int64_t batch = shape[0], heads = shape[1], repeats = heads / shape[2], tokens = shape[3];
    const int size = static_cast<int>(shape[4]);
    const Tensor queries{tensors[0], strides}, keys{tensors[1], strides + 3}, values{tensors[2], strides + 6};
    const Tensor out{tensors[3], strides + 9};
    const int64_t bytes = causal_attention_memory(tokens, size, false);
    // with few heads for the threads, the queries of a head are divided too; the last part has the most work
    const int64_t parts = std::clamp<int64_t>(4 * threads / (batch * heads), 1, std::max<int64_t>(tokens / 256, 1));
    const int64_t part_size = round_up((tokens + parts - 1) / parts, QUERIES);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < parts * batch * heads; task++) {
        const int64_t begin = (parts - 1 - task / (batch * heads)) * part_size, end = std::min(begin + part_size, tokens);
        const int64_t b = task % (batch * heads) / heads, h = task % heads;
        if (begin < end)
            forward(Arena{memory + omp_get_thread_num() * bytes}, queries.head(b, h), keys.head(b, h / repeats),
                    values.head(b, h / repeats), out.head(b, h), lse + (b * heads + h) * tokens,
                    first ? first + b * tokens : nullptr, begin, end, size, scale);
    }
}

// `tensors`: queries, keys, values, out, gradient of out; gradients of queries, keys, values.
void causal_attention_backward(bf16 *const *tensors, const int64_t *strides, const int64_t *shape, const float *lse,
                               const int32_t *first, float scale, char *memory, int threads) {
    const int64_t batch = shape[0], heads = shape[1], key_heads = shape[2], repeats = heads / key_heads;
    const int64_t tokens = shape[3];
    const int size = static_cast<int>(shape[4]);
    const Tensor queries{tensors[0], strides}, keys{tensors[1], strides + 3}, values{tensors[2], strides + 6};
    const Tensor out{tensors[3], strides + 9}, grad{tensors[4], strides + 12}, query_grad{tensors[5], strides + 15};
    const Tensor key_grad{tensors[6], strides + 18}, value_grad{tensors[7], strides + 21};
    const int64_t bytes = causal_attention_memory(tokens, size, true);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < batch * key_heads; task++) {
        const int64_t b = task / key_heads, kh = task % key_heads;
        Arena arena{memory + omp_get_thread_num() * bytes};
        const BackwardMemory own(arena, tokens, size);
        transpose(keys.head(b, kh), tokens, own.across, size, own.keys_across);
        std::fill_n(own.key_grads, tokens * size, 0.0f);
        std::fill_n(own.value_grads, tokens * size, 0.0f);
        for (int64_t h = kh * repeats; h < (kh + 1) * repeats; h++) {
            backward(own, queries.head(b, h), keys.head(b, kh), values.head(b, kh), out.head(b, h), grad.head(b, h),
                     lse + (b * heads + h) * tokens, first ? first + b * tokens : nullptr, tokens, size, scale);
            store_transposed(own.query_grads_across, own.across, tokens, size, scale, query_grad.head(b, h));
        }
        store_rows(own.key_grads, tokens, size, scale, key_grad.head(b, kh));
        store_rows(own.value_grads, tokens, size, 1.0f, value_grad.head(b, kh));
    }
}
}
