// Mean and variance of every channel of every sample, and the way back.
//
//   mean = sum of x / n,   variance = sum of (x - mean)^2 / n,   over the n positions of a channel
//   grad_x = (grad_mean + 2 (x - mean) grad_variance) / n [+ the gradient that x has from elsewhere]
//
// The roof is memory: x is read once, and on the way back x and the other gradient are read once and grad_x written.
// So a chunk is summed, then, while it lies in cache, its distances from its own mean and their squares are. Chunks
// merge into a piece by the formula of Chan, Golub and LeVeque, and pieces, which are few, by two sums; both in double
// and in a fixed order. No square of a large mean is ever subtracted from another.
#include "channel_tiles.hpp"
#include "kernel_tools.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "vector.hpp"

namespace utnetv2 {
namespace UTNETV2_ISA {
namespace {

// Over a run: *distance = sum of x - centre, and if SQUARES *square = sum of (x - centre)^2.
template <bool SQUARES, class A, class T>
void sum_run(const T* x, int64_t count, A centre, A* distance, A* square) {
    constexpr int64_t L = LANES<A>, unroll = 4;
    const Vec<A> middle = broadcast(centre);
    Vec<A> distances[unroll] = {}, squares[unroll] = {};
    int64_t i = 0;
    for (; i + unroll * L <= count; i += unroll * L)
#pragma GCC unroll 4
        for (int u = 0; u < unroll; ++u) {
            const Vec<A> d = load(x + i + u * L) - middle;
            distances[u] += d;
            if (SQUARES) squares[u] += d * d;
        }
    for (; i + L <= count; i += L) {
        const Vec<A> d = load(x + i) - middle;
        distances[0] += d;
        if (SQUARES) squares[0] += d * d;
    }
    *distance = sum<A>((distances[0] + distances[1]) + (distances[2] + distances[3]));
    if (SQUARES) *square = sum<A>((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < count; ++i) {
        const A d = to_arithmetic(x[i]) - centre;
        *distance += d;
        if (SQUARES) *square += d * d;
    }
}

// distance[c] and square[c] += the sums over ROWS rows, for one vector of columns.
template <bool SQUARES, int ROWS, bool PART, class A, class T>
inline void sum_columns(Tile<T> x, int64_t count, const A* centre, A* distance, A* square) {
    const Vec<A> middle = load(centre);
    Vec<A> distances = {}, squares = {};
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
        const Vec<A> d = load_columns<PART>(x.data + r * x.pitch, count) - middle;
        distances += d;
        if (SQUARES) squares += d * d;
    }
    store(distance, load(distance) + distances);
    if (SQUARES) store(square, load(square) + squares);
}

template <bool SQUARES, int ROWS, class A, class T>
inline void sum_row_block(Tile<T> x, int64_t columns, const A* centre, A* distance, A* square) {
    constexpr int64_t L = LANES<A>;
    int64_t c = 0;
    for (; c + L <= columns; c += L, x.data += L)
        sum_columns<SQUARES, ROWS, false>(x, L, centre + c, distance + c, square + c);
    if (c < columns) sum_columns<SQUARES, ROWS, true>(x, columns - c, centre + c, distance + c, square + c);
}

// The same sums for all columns; arrays of whole vectors.
template <bool SQUARES, class A, class T>
void sum_rows(Tile<T> x, int64_t rows, int64_t columns, const A* centre, A* distance, A* square) {
    for (int64_t c = 0; c < columns; ++c) distance[c] = square[c] = 0;
    for (; rows >= 4; rows -= 4, x.data += 4 * x.pitch)
        sum_row_block<SQUARES, 4>(x, columns, centre, distance, square);
    for (; rows > 0; --rows, x.data += x.pitch) sum_row_block<SQUARES, 1>(x, columns, centre, distance, square);
}

template <class T>
void moments(const Tensor& x, const Tensor& mean, const Tensor& variance) {
    using A = Arithmetic<T>;
    const ChannelGeometry g = make_channel_geometry<T>(x);
    const ChannelMap<T> map = as_channel_map<T>(x);
    const int64_t per_piece = 2 * g.piece_channels;
    const Buffer<double> partial(g.pieces() * per_piece);  // [piece][mean, sum of squared distances][channel]

    parallel_for(g.pieces(), [&](int64_t i) {
        const ChannelPiece p = make_channel_piece(g, i);
        const int64_t width = round_up(p.channels, LANES<A>);
        Arena arena(CHUNK_ELEMENTS * sizeof(T), width * sizeof(A), width * sizeof(A), width * sizeof(A));
        const Tiles<T> tiles(g, map, arena.take<T>(CHUNK_ELEMENTS));
        A* centre = arena.take<A>(width);
        A* sums = arena.take<A>(width);
        A* squares = arena.take<A>(width);
        double* means = partial.data + i * per_piece;
        double* distances = means + g.piece_channels;
        for (int64_t c = 0; c < p.channels; ++c) means[c] = distances[c] = 0;

        for_chunks(g, p, [&](const ChannelChunk& k) {
            const Tile<T> tile = tiles.read(k);
            const double before = double(k.p0 - p.p0), count = double(k.positions), share = count / (before + count);
            if (g.channels_last) {
                for (int64_t c = 0; c < width; ++c) centre[c] = 0;
                sum_rows<false>(tile, k.positions, k.channels, centre, sums, squares);
                for (int64_t c = 0; c < width; ++c) centre[c] = sums[c] / A(count);
                sum_rows<true>(tile, k.positions, k.channels, centre, sums, squares);
            } else {
                sum_run<false>(tile.data, k.positions, A(0), sums, squares);
                centre[0] = sums[0] / A(count);
                sum_run<true>(tile.data, k.positions, centre[0], sums, squares);
            }
            double* to_mean = means + (k.c0 - p.c0);
            double* to_distance = distances + (k.c0 - p.c0);
            for (int64_t c = 0; c < k.channels; ++c) {
                // `centre` is off by the rounding of the first sum.
                const double off = double(sums[c]) / count, difference = centre[c] + off - to_mean[c];
                to_mean[c] += difference * share;
                to_distance[c] += squares[c] - count * off * off + difference * difference * before * share;
            }
        });
    });

    const int64_t groups = g.batch * g.channel_pieces;
    parallel_for(groups, [&](int64_t group) {
        const int64_t sample = group / g.channel_pieces, c0 = group % g.channel_pieces * g.piece_channels;
        const int64_t channels = smaller(g.piece_channels, g.channels - c0);
        Arena arena(channels * sizeof(double), channels * sizeof(double));
        double* means = arena.take<double>(channels);
        double* distances = arena.take<double>(channels);
        for (int64_t c = 0; c < channels; ++c) means[c] = distances[c] = 0;
        const auto for_pieces = [&](const auto& visit) {
            for (int64_t j = 0; j < g.position_pieces; ++j) {
                const double count = double(smaller(g.piece_positions, g.positions - j * g.piece_positions));
                const double* of_piece = partial.data + g.piece_of(sample, c0 / g.piece_channels, j) * per_piece;
                visit(count, of_piece, of_piece + g.piece_channels);
            }
        };
        for_pieces([&](double count, const double* mean_, const double*) {
            for (int64_t c = 0; c < channels; ++c) means[c] += count / double(g.positions) * mean_[c];
        });
        for_pieces([&](double count, const double* mean_, const double* distance_) {
            for (int64_t c = 0; c < channels; ++c)
                distances[c] += distance_[c] + count * (mean_[c] - means[c]) * (mean_[c] - means[c]);
        });
        for (int64_t c = 0; c < channels; ++c) {
            element<A>(mean, sample, c0 + c) = A(means[c]);
            element<A>(variance, sample, c0 + c) = A(distances[c] / double(g.positions));
        }
    });
}

// What a channel's gradient is made of: other + offset + slope * (x - centre).
template <bool OTHER, class A>
inline Vec<A> gradient(Vec<A> x, Vec<A> other, Vec<A> centre, Vec<A> slope, Vec<A> offset) {
    const Vec<A> own = slope * (x - centre) + offset;
    return OTHER ? own + other : own;
}

template <bool OTHER, class T, class A>
void backward_run(const T* x, const T* other, T* out, int64_t count, A centre, A slope, A offset) {
    constexpr int64_t L = LANES<A>;
    const Vec<A> m = broadcast(centre), s = broadcast(slope), o = broadcast(offset);
    int64_t i = 0;
    for (; i + L <= count; i += L)
        store(out + i, gradient<OTHER, A>(load(x + i), OTHER ? load(other + i) : Vec<A>{}, m, s, o));
    if (i == count) return;
    const Vec<A> rest = OTHER ? load_part(other + i, count - i) : Vec<A>{};
    store_part(out + i, gradient<OTHER, A>(load_part(x + i, count - i), rest, m, s, o), count - i);
}

template <bool OTHER, bool PART, class T, class A>
inline void backward_columns(const T* x, const T* other, T* out, int64_t count, const A* centre, const A* slope,
                             const A* offset) {
    const Vec<A> o = OTHER ? load_columns<PART>(other, count) : Vec<A>{};
    const Vec<A> result =
        gradient<OTHER, A>(load_columns<PART>(x, count), o, load(centre), load(slope), load(offset));
    store_columns<PART>(out, result, count);
}

template <bool OTHER, class T, class A>
void backward_rows(Tile<T> x, Tile<T> other, Tile<T> out, int64_t rows, int64_t columns, const A* centre,
                   const A* slope, const A* offset) {
    constexpr int64_t L = LANES<A>;
    for (int64_t r = 0; r < rows; ++r) {
        const T* x_row = x.data + r * x.pitch;
        const T* other_row = OTHER ? other.data + r * other.pitch : nullptr;
        T* out_row = out.data + r * out.pitch;
        int64_t c = 0;
        for (; c + L <= columns; c += L)
            backward_columns<OTHER, false>(x_row + c, OTHER ? other_row + c : nullptr, out_row + c, L, centre + c,
                                           slope + c, offset + c);
        if (c < columns)
            backward_columns<OTHER, true>(x_row + c, OTHER ? other_row + c : nullptr, out_row + c, columns - c,
                                          centre + c, slope + c, offset + c);
    }
}

template <bool OTHER, class T>
void moments_backward(const Tensor& grad_mean, const Tensor& grad_variance, const Tensor& x, const Tensor& mean,
                      const Tensor* other, const Tensor& grad_x) {
    using A = Arithmetic<T>;
    const ChannelGeometry g = make_channel_geometry<T>(x);
    const ChannelMap<T> x_map = as_channel_map<T>(x), out_map = as_channel_map<T>(grad_x);
    const ChannelMap<T> other_map = OTHER ? as_channel_map<T>(*other) : x_map;

    parallel_for(g.pieces(), [&](int64_t i) {
        const ChannelPiece p = make_channel_piece(g, i);
        const int64_t width = round_up(p.channels, LANES<A>);
        Arena arena(CHUNK_ELEMENTS * sizeof(T), CHUNK_ELEMENTS * sizeof(T), CHUNK_ELEMENTS * sizeof(T),
                    width * sizeof(A), width * sizeof(A), width * sizeof(A));
        const Tiles<T> x_tiles(g, x_map, arena.take<T>(CHUNK_ELEMENTS));
        const Tiles<T> other_tiles(g, other_map, arena.take<T>(CHUNK_ELEMENTS));
        const Tiles<T> out_tiles(g, out_map, arena.take<T>(CHUNK_ELEMENTS));
        A* centre = arena.take<A>(width);
        A* slope = arena.take<A>(width);
        A* offset = arena.take<A>(width);
        for (int64_t c = 0; c < width; ++c) centre[c] = slope[c] = offset[c] = 0;
        const A n = A(g.positions);
        for (int64_t c = 0; c < p.channels; ++c) {
            centre[c] = element<A>(mean, p.sample, p.c0 + c);
            slope[c] = 2 * element<A>(grad_variance, p.sample, p.c0 + c) / n;
            offset[c] = element<A>(grad_mean, p.sample, p.c0 + c) / n;
        }
        for_chunks(g, p, [&](const ChannelChunk& k) {
            const Tile<T> from = x_tiles.read(k), to = out_tiles.at(k);
            const Tile<T> plus = OTHER ? other_tiles.read(k) : Tile<T>{nullptr, 0};
            const int64_t c = k.c0 - p.c0;
            if (g.channels_last)
                backward_rows<OTHER>(from, plus, to, k.positions, k.channels, centre, slope, offset);
            else
                backward_run<OTHER>(from.data, plus.data, to.data, k.positions, centre[c], slope[c], offset[c]);
            out_tiles.written(k);
        });
    });
}

}  // namespace

void channel_moments(const Tensor& x, const Tensor& mean, const Tensor& variance) {
    for_storage(x.dtype, [&](auto type) { moments<decltype(type)>(x, mean, variance); });
}

void channel_moments_backward(const Tensor& grad_mean, const Tensor& grad_variance, const Tensor& x,
                              const Tensor& mean, const Tensor* other, const Tensor& grad_x) {
    for_storage(x.dtype, [&](auto type) {
        using T = decltype(type);
        if (other)
            moments_backward<true, T>(grad_mean, grad_variance, x, mean, other, grad_x);
        else
            moments_backward<false, T>(grad_mean, grad_variance, x, mean, other, grad_x);
    });
}

}  // namespace UTNETV2_ISA
}  // namespace utnetv2
