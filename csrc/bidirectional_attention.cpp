// Bidirectional attention between a token map and a semantic map (UTNetV2, section 3.2), for every sample and head:
//
//   S = scale * q map_q^T                                   (n, l)
//   P = softmax(S, over l),   C = softmax(S, over n)
//   out = P map_v,            map_out = C^T v               (n, d) and (l, d)
//
// and backward, from dP = dout map_v^T and dC = v dmap_out^T:
//
//   dS = P (dP - sum over l of P dP) + C (dC - <dmap_out, map_out>)
//   dq = scale dS map_q,   dmap_q = scale dS^T q,   dv = C dmap_out,   dmap_v = P^T dout
//
// Three products of n l d forward and seven backward, against (3 n d) and (5 n d) elements to move: 4 l / 3 operations
// a byte, so arithmetic is the roof, and after it the exponentials. A piece of work is a head and a range of tokens,
// cut into tiles that stay in cache. S lies transposed, tokens across the lanes, which makes the softmax over l a
// matter of whole vectors. One exponential serves both softmaxes: E = exp(S - R), R the largest score met so far, gives
// P when divided by its sum over l and C by its sum over n, as long as no row's maximum is so far below R that E
// underflows (that tile then takes exponentials of its own), and no column's either (the piece's columns are then done
// again, each from its own maximum). A piece's columns are partial sums; a second pass puts the pieces together in
// their order.
#include "kernel_tools.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "product.hpp"
#include "tile.hpp"
#include "vector.hpp"

namespace utnetv2 {
namespace UTNETV2_ISA {
namespace {

constexpr int64_t LONGEST_RANGE = 2048;   // tokens of a piece: bounds the partial sums
constexpr int64_t SHORTEST_RANGE = 128;   // makes the map's preparation small beside the work
constexpr int64_t PIECES = 32;            // at least, where n allows: enough for many threads
constexpr double ROW_RANGE = 30;          // a row's maximum so far below R still leaves e^-57 of it above underflow
constexpr double COLUMN_RANGE = 40;       // the same for a column, whose sum is what is known of it

template <class T>
struct Matrices {  // one (rows, d) matrix per sample and head
    T* data;
    int64_t sample, head, row, column;  // strides
    T* of(int64_t b, int64_t h) const { return data + b * sample + h * head; }
};

template <class T>
Matrices<T> matrices(const Tensor& t) {
    return {static_cast<T*>(t.data), t.strides[0], t.strides[1], t.strides[2], t.strides[3]};
}

struct Shape {
    int64_t batch, heads, n, l, d;
    int64_t l_pitch, d_pitch;  // l and d in whole vectors
    int64_t tile;              // tokens of a tile, a multiple of two vectors
    int64_t range, ranges;     // tokens of a piece, pieces of a head

    int64_t pieces() const { return batch * heads * ranges; }
    // One of few tokens may have nearly all of a column's weight, and the rounding of what rescales it would then stand
    // where the gradient of a softmax that decided cancels to zero. So few cost little to compute apart.
    bool few_tokens() const { return n <= tile; }
};

template <class A>
Shape make_shape(const Tensor& q, const Tensor& map_q) {
    constexpr int64_t L = LANES<A>;
    Shape s;
    s.batch = q.sizes[0], s.heads = q.sizes[1], s.n = q.sizes[2], s.d = q.sizes[3], s.l = map_q.sizes[2];
    s.l_pitch = divide_up(s.l, L) * L, s.d_pitch = divide_up(s.d, L) * L;
    s.tile = s.d <= 64 ? 128 : s.d <= 128 ? 64 : 32;
    const int64_t wanted = divide_up(PIECES, larger(s.batch * s.heads, int64_t(1)));
    const int64_t range = clamp(divide_up(s.n, wanted), SHORTEST_RANGE, LONGEST_RANGE);
    s.range = divide_up(range, s.tile) * s.tile;
    s.ranges = divide_up(s.n, s.range);
    return s;
}

struct Piece {
    int64_t b, h, first, last;  // tokens [first, last)
};

Piece make_piece(const Shape& s, int64_t i) {
    const int64_t head = i / s.ranges, first = i % s.ranges * s.range;
    return {head / s.heads, head % s.heads, first, smaller(first + s.range, s.n)};
}

// Rows of a map in whole vectors, times `factor`.
template <class T, class A>
void copy_map_in(const Matrices<T>& map, const Piece& p, const Shape& s, A factor, A* to) {
    copy_in(map.of(p.b, p.h), map.row, map.column, s.l, s.d, to, s.d_pitch);
    if (factor == A(1)) return;
    for (int64_t i = 0; i < s.l * s.d_pitch; ++i) to[i] *= factor;
}

template <class A>
void fill(A* to, int64_t count, A value) {
    for (int64_t i = 0; i < count; ++i) to[i] = value;
}

template <class A>
void multiply(A* to, int64_t count, A factor) {
    for (int64_t i = 0; i < count; i += LANES<A>) store(to + i, load(to + i) * factor);
}

// The tokens of the tile that begins at token t, to be fetched in `steps`; those of none behind the range.
template <class T>
Fetch<T> fetch_tile(const Shape& s, const Matrices<T>& m, const Piece& p, int64_t t, int64_t steps) {
    const int64_t count = larger(smaller(s.tile, p.last - t), int64_t(0));
    return {m.of(p.b, p.h) + t * m.row, m.row, m.column, count, s.d, steps};
}

// scores[j][token] of the tile that begins at token t; tokens beyond the range have none at all.
template <class T, class A, class F>
void compute_scores(const Shape& s, const Matrices<T>& q, const Piece& p, int64_t t, const A* map_q, A* q_tile,
                    A* scores, F&& meanwhile) {
    const int64_t count = smaller(s.tile, p.last - t);
    copy_in(q.of(p.b, p.h) + t * q.row, q.column, q.row, s.d, count, q_tile, s.tile);
    product<false>(s.l, s.tile / LANES<A>, s.d, Strided<A>{map_q, s.d_pitch, 1}, q_tile, s.tile, scores, s.tile,
                   meanwhile);
    for (int64_t j = 0; j < s.l && count < s.tile; ++j)
        fill(scores + j * s.tile + count, s.tile - count, A(-__builtin_inf()));
}

// row_max[token], the tile's largest score, and its smallest row maximum.
template <class A>
void find_maxima(const Shape& s, const A* scores, int64_t count, A* row_max, A& largest, A& smallest) {
    constexpr int64_t L = LANES<A>;
    Vec<A> high = broadcast(A(-__builtin_inf())), low = -high;
    for (int64_t x = 0; x < s.tile; x += L) {
        Vec<A> top = load(scores + x);
        for (int64_t j = 1; j < s.l; ++j) top = maximum<A>(load(scores + j * s.tile + x), top);
        store(row_max + x, top);
        high = maximum<A>(top, high);
        if (x + L <= count) low = minimum<A>(top, low);
    }
    largest = maximum<A>(high), smallest = minimum<A>(low);
    for (int64_t x = count / L * L; x < count; ++x) smallest = row_max[x] < smallest ? row_max[x] : smallest;
}

// The sums over n of one piece, for every map token j relative to exp(reference[j]).
template <class A>
struct Columns {
    A *reference, *sum, *weighted;  // (l), (l), (l, d_pitch)

    static int64_t elements(const Shape& s) { return s.l * (2 + s.d_pitch); }
    Columns(const Shape& s, A* memory) : reference(memory), sum(memory + s.l), weighted(memory + 2 * s.l) {}
};

// exponentials[j][token] = exp(scores - reference); row_sum over j, and over tokens added to column_sums (l, LANES).
template <bool COLUMNS, class A, class F>
void exponentiate(const Shape& s, const A* scores, A reference, A* exponentials, A* row_sum, A* column_sums,
                  F&& meanwhile) {
    constexpr int64_t L = LANES<A>;
    fill(row_sum, s.tile, A(0));
    for (int64_t j = 0; j < s.l; ++j) {
        meanwhile();
        Vec<A> column = COLUMNS ? load(column_sums + j * L) : Vec<A>{};
        for (int64_t x = 0; x < s.tile; x += L) {
            const Vec<A> e = exponential(load(scores + j * s.tile + x) - reference);
            store(exponentials + j * s.tile + x, e);
            store(row_sum + x, load(row_sum + x) + e);
            column += e;
        }
        if (COLUMNS) store(column_sums + j * L, column);
    }
}

// The same for rows alone, each token's from its own maximum.
template <class A>
void exponentiate_rows(const Shape& s, const A* scores, const A* row_max, A* exponentials, A* row_sum) {
    constexpr int64_t L = LANES<A>;
    for (int64_t x = 0; x < s.tile; x += L) {
        const Vec<A> top = load(row_max + x);
        Vec<A> total{};
        for (int64_t j = 0; j < s.l; ++j) {
            const Vec<A> e = exponential(load(scores + j * s.tile + x) - top);
            store(exponentials + j * s.tile + x, e);
            total += e;
        }
        store(row_sum + x, total);
    }
}

// out (tokens, d) = weights^T (tokens, l) map (l, d), through `tile` where vectors of the product are none of `out`.
template <class T, class A, class F>
void write_tokens(const Shape& s, const A* weights, const A* map, int64_t count, A* tile, T* out, int64_t row,
                  int64_t column, F&& meanwhile) {
    constexpr int64_t L = LANES<A>;
    const Strided<A> by_d{map, 1, s.d_pitch}, by_token{weights, 1, s.tile};
    if (row == 1 && count == s.tile) {  // tokens vary fastest
        product<false>(s.d, s.tile / L, s.l, by_d, weights, s.tile, out, column, meanwhile);
    } else if (row == 1) {
        product<false>(s.d, s.tile / L, s.l, by_d, weights, s.tile, tile, s.tile, meanwhile);
        copy_out(tile, s.tile, s.d, count, out, column, row);
    } else if (column == 1 && s.d == s.d_pitch) {
        product<false>(count, s.d_pitch / L, s.l, by_token, map, s.d_pitch, out, row, meanwhile);
    } else {
        product<false>(count, s.d_pitch / L, s.l, by_token, map, s.d_pitch, tile, s.d_pitch, meanwhile);
        copy_out(tile, s.d_pitch, count, s.d, out, row, column);
    }
}

int64_t write_steps(const Shape& s, int64_t lanes, int64_t row) {
    return row == 1 ? product_steps(s.d, s.tile / lanes) : product_steps(s.tile, s.d_pitch / lanes);
}

// Every token's weights divided by their sum.
template <class A>
void divide_rows(const Shape& s, A* weights, const A* row_sum) {
    for (int64_t x = 0; x < s.tile; x += LANES<A>) {
        const Vec<A> factor = A(1) / load(row_sum + x);
        for (int64_t j = 0; j < s.l; ++j) {
            A* at = weights + j * s.tile + x;
            store(at, load(at) * factor);
        }
    }
}

// The sums of a piece whose columns lie too far apart for one reference.
template <class T, class A>
void sum_columns_apart(const Shape& s, const Matrices<T>& q, const Matrices<T>& v, const Piece& p, const A* map_q,
                       A* q_tile, A* scores, A* v_tile, const Columns<A>& columns) {
    constexpr int64_t L = LANES<A>;
    fill(columns.reference, s.l, A(-__builtin_inf()));
    fill(columns.sum, s.l, A(0));
    fill(columns.weighted, s.l * s.d_pitch, A(0));
    for (int64_t t = p.first; t < p.last; t += s.tile) {
        const int64_t count = smaller(s.tile, p.last - t);
        compute_scores(s, q, p, t, map_q, q_tile, scores, [] {});
        for (int64_t j = 0; j < s.l; ++j) {
            A* column = scores + j * s.tile;
            Vec<A> top = load(column);
            for (int64_t x = L; x < s.tile; x += L) top = maximum<A>(load(column + x), top);
            const A old = columns.reference[j], next = maximum<A>(maximum<A>(top, broadcast(old)));
            const A factor = exponential(broadcast(old - next))[0];
            Vec<A> total{};
            for (int64_t x = 0; x < s.tile; x += L) {
                const Vec<A> e = exponential(load(column + x) - next);
                store(column + x, e);
                total += e;
            }
            columns.reference[j] = next;
            columns.sum[j] = columns.sum[j] * factor + sum<A>(total);
            multiply(columns.weighted + j * s.d_pitch, s.d_pitch, factor);
        }
        copy_in(v.of(p.b, p.h) + t * v.row, v.row, v.column, count, s.d, v_tile, s.d_pitch);
        product<true>(s.l, s.d_pitch / L, count, Strided<A>{scores, s.tile, 1}, v_tile, s.d_pitch, columns.weighted,
                      s.d_pitch);
    }
}

// out, and with COLUMNS the sums of every piece.
template <bool COLUMNS, class T, class A>
void attend(const Shape& s, const Matrices<T>& q, const Matrices<T>& v, const Matrices<T>& map_q,
            const Matrices<T>& map_v, A scale, const Matrices<T>& out, A* sums) {
    constexpr int64_t L = LANES<A>;
    const A lowest = exponential(broadcast(A(-COLUMN_RANGE)))[0];
    const int64_t scores_steps = product_steps(s.l, s.tile / L);
    parallel_for(s.pieces(), [&](int64_t i) {
        const Piece p = make_piece(s, i);
        const int64_t map_size = s.l * s.d_pitch, tile_size = s.tile * s.d_pitch, scores_size = s.l * s.tile;
        Arena arena(map_size * sizeof(A), map_size * sizeof(A), tile_size * sizeof(A), tile_size * sizeof(A),
                    scores_size * sizeof(A), scores_size * sizeof(A), 2 * s.tile * sizeof(A), s.l * L * sizeof(A));
        A* q_map = arena.take<A>(map_size);
        A* v_map = arena.take<A>(map_size);
        A* q_tile = arena.take<A>(tile_size);  // (d, tile), later that of out
        A* v_tile = arena.take<A>(tile_size);  // (tile, d_pitch)
        A* scores = arena.take<A>(scores_size);
        A* exponentials = arena.take<A>(scores_size);
        A* row_max = arena.take<A>(2 * s.tile);
        A* row_sum = row_max + s.tile;
        A* column_sums = arena.take<A>(s.l * L);
        copy_map_in(map_q, p, s, scale, q_map);
        copy_map_in(map_v, p, s, A(1), v_map);
        const Columns<A> columns(s, sums + (COLUMNS ? i * Columns<A>::elements(s) : 0));
        if (COLUMNS) {
            fill(columns.weighted, map_size, A(0));
            fill(column_sums, s.l * L, A(0));
        }

        A reference = A(-__builtin_inf());
        for (int64_t t = p.first; t < p.last; t += s.tile) {
            const int64_t count = smaller(s.tile, p.last - t);
            compute_scores(s, q, p, t, q_map, q_tile, scores, fetch_tile(s, out, p, t, scores_steps));
            A largest, smallest;
            find_maxima(s, scores, count, row_max, largest, smallest);
            if (!(largest <= reference)) {
                if (COLUMNS && t > p.first) {
                    const A factor = exponential(broadcast(reference - largest))[0];
                    multiply(columns.weighted, map_size, factor);
                    multiply(column_sums, s.l * L, factor);
                }
                reference = largest;
            }
            const bool shared = smallest >= reference - A(ROW_RANGE);
            if (COLUMNS || shared)
                exponentiate<COLUMNS>(s, scores, reference, exponentials, row_sum, column_sums,
                                      fetch_tile(s, v, p, COLUMNS ? t + s.tile : p.last, s.l));
            if (COLUMNS) {
                copy_in(v.of(p.b, p.h) + t * v.row, v.row, v.column, count, s.d, v_tile, s.d_pitch);
                product<true>(s.l, s.d_pitch / L, count, Strided<A>{exponentials, s.tile, 1}, v_tile, s.d_pitch,
                              columns.weighted, s.d_pitch);
            }
            if (!shared) exponentiate_rows(s, scores, row_max, exponentials, row_sum);
            divide_rows(s, exponentials, row_sum);
            write_tokens(s, exponentials, v_map, count, q_tile, out.of(p.b, p.h) + t * out.row, out.row, out.column,
                         fetch_tile(s, q, p, t + s.tile, write_steps(s, L, out.row)));
        }
        if (!COLUMNS) return;
        bool apart = s.few_tokens();
        for (int64_t j = 0; j < s.l; ++j) {
            columns.reference[j] = reference;
            columns.sum[j] = sum<A>(load(column_sums + j * L));
            apart |= !(columns.sum[j] >= lowest);
        }
        if (apart) sum_columns_apart(s, q, v, p, q_map, q_tile, scores, v_tile, columns);
    });
}

template <class T>
void forward(const Tensor& q, const Tensor& v, const Tensor& map_q, const Tensor& map_v, double scale,
             const Tensor& out, const Tensor& map_out, const Tensor& column_lse) {
    using A = Arithmetic<T>;
    const Shape s = make_shape<A>(q, map_q);
    const int64_t per_piece = Columns<A>::elements(s);
    const Buffer<A> sums(s.pieces() * per_piece);
    attend<true>(s, matrices<T>(q), matrices<T>(v), matrices<T>(map_q), matrices<T>(map_v), A(scale),
                 matrices<T>(out), sums.data);

    const Matrices<T> result = matrices<T>(map_out);
    A* lse = static_cast<A*>(column_lse.data);
    parallel_for(s.batch * s.heads * s.l, [&](int64_t i) {
        const int64_t head = i / s.l, j = i % s.l;
        Arena arena(s.d_pitch * sizeof(A));
        A* weighted = arena.take<A>(s.d_pitch);
        const auto piece = [&](int64_t r) { return Columns<A>(s, sums.data + (head * s.ranges + r) * per_piece); };
        A reference = piece(0).reference[j];
        for (int64_t r = 1; r < s.ranges; ++r) {
            const A other = piece(r).reference[j];
            reference = other > reference || other != other ? other : reference;
        }
        A total = 0;
        fill(weighted, s.d_pitch, A(0));
        for (int64_t r = 0; r < s.ranges; ++r) {
            const Columns<A> part = piece(r);
            const A factor = exponential(broadcast(part.reference[j] - reference))[0];
            total += part.sum[j] * factor;
            for (int64_t k = 0; k < s.d_pitch; k += LANES<A>)
                store(weighted + k, load(weighted + k) + load(part.weighted + j * s.d_pitch + k) * factor);
        }
        multiply(weighted, s.d_pitch, 1 / total);
        T* to = result.of(head / s.heads, head % s.heads) + j * result.row;
        copy_out(weighted, s.d_pitch, 1, s.d, to, 0, result.column);
        lse[i] = reference + A(__builtin_log(double(total)));
    });
}

// What the backward pass of the columns needs besides the inputs; unused without COLUMNS.
template <class T, class A>
struct ColumnGradients {
    Matrices<T> v, grad_map_out, map_out, grad_v;
    const A* lse;  // (B, H, l)
};

template <bool COLUMNS, class T, class A>
void differentiate(const Shape& s, const Matrices<T>& grad_out, const Matrices<T>& q, const Matrices<T>& map_q,
                   const Matrices<T>& map_v, const ColumnGradients<T, A>& column, A scale, const Matrices<T>& grad_q,
                   const Matrices<T>& grad_map_q, const Matrices<T>& grad_map_v) {
    constexpr int64_t L = LANES<A>;
    const int64_t map_size = s.l * s.d_pitch, tile_size = s.tile * s.d_pitch, scores_size = s.l * s.tile;
    const int64_t scores_steps = product_steps(s.l, s.tile / L);
    const Buffer<A> partial(s.pieces() * 2 * map_size);  // [piece][grad_map_q, grad_map_v][j][k]

    parallel_for(s.pieces(), [&](int64_t i) {
        const Piece p = make_piece(s, i);
        const int64_t maps = COLUMNS ? 3 : 2, tiles = COLUMNS ? 4 : 3, squares = COLUMNS ? 4 : 3;
        Arena arena(maps * map_size * sizeof(A), tiles * tile_size * sizeof(A), squares * scores_size * sizeof(A),
                    3 * s.tile * sizeof(A), 3 * s.l_pitch * sizeof(A));
        A* q_map = arena.take<A>(maps * map_size);
        A* v_map = q_map + map_size;
        A* grad_map = v_map + map_size;
        A* q_tile = arena.take<A>(tiles * tile_size);  // (d, tile), then (tile, d_pitch)
        A* grad_tile = q_tile + tile_size;             // the same of grad_out
        A* result_tile = grad_tile + tile_size;
        A* v_tile = result_tile + tile_size;  // (d, tile)
        A* scores = arena.take<A>(squares * scores_size);
        A* rows = scores + scores_size;            // exp, then P
        A* grad_rows = rows + scores_size;         // dP, then dS
        A* grad_columns = grad_rows + scores_size;  // dC, then C
        A* row_max = arena.take<A>(3 * s.tile);
        A* row_sum = row_max + s.tile;
        A* row_dot = row_sum + s.tile;
        A* lse = arena.take<A>(3 * s.l_pitch);
        A* column_dot = lse + s.l_pitch;
        A* column_factor = column_dot + s.l_pitch;
        A* grad_q_map = partial.data + i * 2 * map_size;
        A* grad_v_map = grad_q_map + map_size;

        copy_map_in(map_q, p, s, scale, q_map);
        copy_map_in(map_v, p, s, A(1), v_map);
        fill(grad_q_map, 2 * map_size, A(0));
        fill(lse, 3 * s.l_pitch, A(0));
        A lowest_lse = A(__builtin_inf());
        if (COLUMNS) {
            copy_map_in(column.map_out, p, s, A(1), grad_q_map);  // there only until its products are taken
            copy_map_in(column.grad_map_out, p, s, A(1), grad_map);
            for (int64_t j = 0; j < s.l; ++j) {
                for (int64_t k = 0; k < s.d; ++k)
                    column_dot[j] += grad_map[j * s.d_pitch + k] * grad_q_map[j * s.d_pitch + k];
                lse[j] = column.lse[(p.b * s.heads + p.h) * s.l + j];
                lowest_lse = lse[j] < lowest_lse ? lse[j] : lowest_lse;
            }
            fill(grad_q_map, map_size, A(0));
        }

        for (int64_t t = p.first; t < p.last; t += s.tile) {
            const int64_t count = smaller(s.tile, p.last - t);
            compute_scores(s, q, p, t, q_map, q_tile, scores, fetch_tile(s, grad_q, p, t, scores_steps));
            A largest, smallest;
            find_maxima(s, scores, count, row_max, largest, smallest);
            const bool shared = !s.few_tokens() && smallest >= largest - A(ROW_RANGE) &&
                                lowest_lse >= largest - A(COLUMN_RANGE);
            if (shared)
                exponentiate<false>(s, scores, largest, rows, row_sum, static_cast<A*>(nullptr),
                                    fetch_tile(s, grad_out, p, t + s.tile, s.l));
            else
                exponentiate_rows(s, scores, row_max, rows, row_sum);

            const T* grad = grad_out.of(p.b, p.h) + t * grad_out.row;
            copy_in(grad, grad_out.column, grad_out.row, s.d, count, grad_tile, s.tile);
            product<false>(s.l, s.tile / L, s.d, Strided<A>{v_map, s.d_pitch, 1}, grad_tile, s.tile, grad_rows, s.tile,
                           fetch_tile(s, q, p, t + s.tile, scores_steps));
            if (COLUMNS) {
                copy_in(column.v.of(p.b, p.h) + t * column.v.row, column.v.column, column.v.row, s.d, count, v_tile,
                        s.tile);
                product<false>(s.l, s.tile / L, s.d, Strided<A>{grad_map, s.d_pitch, 1}, v_tile, s.tile, grad_columns,
                               s.tile, fetch_tile(s, column.grad_v, p, t, scores_steps));
                for (int64_t j = 0; j < s.l_pitch && shared; j += L)
                    store(column_factor + j, exponential(largest - load(lse + j)));
            }

            for (int64_t x = 0; x < s.tile; x += L) {
                Vec<A> dot{};
                for (int64_t j = 0; j < s.l; ++j)
                    dot += load(rows + j * s.tile + x) * load(grad_rows + j * s.tile + x);
                const Vec<A> inverse = A(1) / load(row_sum + x);
                store(row_dot + x, dot * inverse);
                store(row_sum + x, inverse);
            }
            for (int64_t j = 0; j < s.l; ++j)
                for (int64_t x = 0; x < s.tile; x += L) {
                    const int64_t at = j * s.tile + x;
                    const Vec<A> e = load(rows + at), row = e * load(row_sum + x);
                    Vec<A> grad_score = row * (load(grad_rows + at) - load(row_dot + x));
                    if (COLUMNS) {
                        const Vec<A> c = shared ? e * column_factor[j] : exponential(load(scores + at) - lse[j]);
                        grad_score += c * (load(grad_columns + at) - column_dot[j]);
                        store(grad_columns + at, c);
                    }
                    store(rows + at, row);
                    store(grad_rows + at, grad_score);
                }

            write_tokens(s, grad_rows, q_map, count, result_tile, grad_q.of(p.b, p.h) + t * grad_q.row, grad_q.row,
                         grad_q.column, [] {});
            if (COLUMNS)
                write_tokens(s, grad_columns, grad_map, count, result_tile,
                             column.grad_v.of(p.b, p.h) + t * column.grad_v.row, column.grad_v.row,
                             column.grad_v.column,
                             fetch_tile(s, column.v, p, t + s.tile, write_steps(s, L, column.grad_v.row)));
            copy_in(q.of(p.b, p.h) + t * q.row, q.row, q.column, count, s.d, q_tile, s.d_pitch);
            product<true>(s.l, s.d_pitch / L, count, Strided<A>{grad_rows, s.tile, 1}, q_tile, s.d_pitch, grad_q_map,
                          s.d_pitch);
            copy_in(grad, grad_out.row, grad_out.column, count, s.d, grad_tile, s.d_pitch);
            product<true>(s.l, s.d_pitch / L, count, Strided<A>{rows, s.tile, 1}, grad_tile, s.d_pitch, grad_v_map,
                          s.d_pitch);
        }
    });

    parallel_for(s.batch * s.heads * 2, [&](int64_t i) {
        const int64_t head = i / 2, which = i % 2;
        A* total = partial.data + (head * s.ranges * 2 + which) * map_size;
        for (int64_t r = 1; r < s.ranges; ++r) {
            const A* other = total + r * 2 * map_size;
            for (int64_t k = 0; k < map_size; k += L) store(total + k, load(total + k) + load(other + k));
        }
        if (which == 0) multiply(total, map_size, scale);
        const Matrices<T>& to = which == 0 ? grad_map_q : grad_map_v;
        copy_out(total, s.d_pitch, s.l, s.d, to.of(head / s.heads, head % s.heads), to.row, to.column);
    });
}

}  // namespace

void bidirectional_attention(const Tensor& q, const Tensor& v, const Tensor& map_q, const Tensor& map_v, double scale,
                             const Tensor& out, const Tensor& map_out, const Tensor& column_lse) {
    for_storage(q.dtype, [&](auto type) {
        forward<decltype(type)>(q, v, map_q, map_v, scale, out, map_out, column_lse);
    });
}

void bidirectional_attention_backward(const Tensor& grad_out, const Tensor& grad_map_out, const Tensor& q,
                                      const Tensor& v, const Tensor& map_q, const Tensor& map_v,
                                      const Tensor& map_out, const Tensor& column_lse, double scale,
                                      const Tensor& grad_q, const Tensor& grad_v, const Tensor& grad_map_q,
                                      const Tensor& grad_map_v) {
    for_storage(q.dtype, [&](auto type) {
        using T = decltype(type);
        using A = Arithmetic<T>;
        const ColumnGradients<T, A> column{matrices<T>(v), matrices<T>(grad_map_out), matrices<T>(map_out),
                                           matrices<T>(grad_v), static_cast<const A*>(column_lse.data)};
        differentiate<true, T, A>(make_shape<A>(q, map_q), matrices<T>(grad_out), matrices<T>(q), matrices<T>(map_q),
                                  matrices<T>(map_v), column, A(scale), matrices<T>(grad_q), matrices<T>(grad_map_q),
                                  matrices<T>(grad_map_v));
    });
}

void token_attention(const Tensor& q, const Tensor& map_q, const Tensor& map_v, double scale, const Tensor& out) {
    for_storage(q.dtype, [&](auto type) {
        using T = decltype(type);
        using A = Arithmetic<T>;
        attend<false, T, A>(make_shape<A>(q, map_q), matrices<T>(q), matrices<T>(q), matrices<T>(map_q),
                            matrices<T>(map_v), A(scale), matrices<T>(out), nullptr);
    });
}

void token_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& map_q, const Tensor& map_v,
                              double scale, const Tensor& grad_q, const Tensor& grad_map_q,
                              const Tensor& grad_map_v) {
    for_storage(q.dtype, [&](auto type) {
        using T = decltype(type);
        using A = Arithmetic<T>;
        differentiate<false, T, A>(make_shape<A>(q, map_q), matrices<T>(grad_out), matrices<T>(q), matrices<T>(map_q),
                                   matrices<T>(map_v), ColumnGradients<T, A>{}, A(scale), matrices<T>(grad_q),
                                   matrices<T>(grad_map_q), matrices<T>(grad_map_v));
    });
}

}  // namespace UTNETV2_ISA
}  // namespace utnetv2
