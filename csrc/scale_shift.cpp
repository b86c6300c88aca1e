// Every channel of every sample times a scale plus a shift, then ReLU where wanted: the second half of a normalisation.
//
//   y = x * scale + shift,   result = max(y, 0)
//   grad_y = grad where y > 0 (everywhere without ReLU),   grad_x = grad_y * scale,
//   grad_scale = sum of grad_y * x,   grad_shift = sum of grad_y,   over the positions of a channel
//
// The roof is memory: forward reads x and writes the result; backward reads grad and x once, finds y again instead of
// reading it, writes grad_x and sums on the way. Sums are of the arithmetic's precision over a chunk, then double.
#include "channel_tiles.hpp"
#include "kernel_tools.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "vector.hpp"

namespace utnetv2 {
namespace UTNETV2_ISA {
namespace {

template <bool RELU, class A>
inline Vec<A> result_of(Vec<A> x, Vec<A> scale, Vec<A> shift) {
    const Vec<A> y = x * scale + shift;
    return RELU ? maximum<A>(y, Vec<A>{}) : y;
}

// The gradient of y.
template <bool RELU, class A>
inline Vec<A> masked(Vec<A> grad, Vec<A> x, Vec<A> scale, Vec<A> shift) {
    const Vec<A> y = x * scale + shift;
    return RELU ? select<A>(y <= 0, Vec<A>{}, grad) : grad;  // where y is NaN, as torch has it, the gradient passes
}

template <bool RELU, class T, class A>
void forward_run(const T* x, T* out, int64_t count, A scale, A shift) {
    constexpr int64_t L = LANES<A>;
    const Vec<A> s = broadcast(scale), t = broadcast(shift);
    int64_t i = 0;
    for (; i + L <= count; i += L) store(out + i, result_of<RELU, A>(load(x + i), s, t));
    if (i < count) store_part(out + i, result_of<RELU, A>(load_part(x + i, count - i), s, t), count - i);
}

template <bool RELU, class T, class A>
void forward_rows(Tile<T> x, Tile<T> out, int64_t rows, int64_t columns, const A* scale, const A* shift) {
    constexpr int64_t L = LANES<A>;
    for (int64_t r = 0; r < rows; ++r) {
        const T* from = x.data + r * x.pitch;
        T* to = out.data + r * out.pitch;
        int64_t c = 0;
        for (; c + L <= columns; c += L)
            store(to + c, result_of<RELU, A>(load(from + c), load(scale + c), load(shift + c)));
        if (c == columns) continue;
        const Vec<A> rest = load_part(from + c, columns - c);
        store_part(to + c, result_of<RELU, A>(rest, load(scale + c), load(shift + c)), columns - c);
    }
}

template <bool RELU, class T>
void forward(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& out) {
    using A = Arithmetic<T>;
    const ChannelGeometry g = make_channel_geometry<T>(x);
    const ChannelMap<T> x_map = as_channel_map<T>(x), out_map = as_channel_map<T>(out);

    parallel_for(g.pieces(), [&](int64_t i) {
        const ChannelPiece p = make_channel_piece(g, i);
        const int64_t width = round_up(p.channels, LANES<A>);
        Arena arena(CHUNK_ELEMENTS * sizeof(T), CHUNK_ELEMENTS * sizeof(T), width * sizeof(A), width * sizeof(A));
        const Tiles<T> x_tiles(g, x_map, arena.take<T>(CHUNK_ELEMENTS));
        const Tiles<T> out_tiles(g, out_map, arena.take<T>(CHUNK_ELEMENTS));
        A* scales = arena.take<A>(width);
        A* shifts = arena.take<A>(width);
        copy_parameters(scale, p, width, scales);
        copy_parameters(shift, p, width, shifts);
        for_chunks(g, p, [&](const ChannelChunk& k) {
            const Tile<T> from = x_tiles.read(k), to = out_tiles.at(k);
            const int64_t c = k.c0 - p.c0;
            if (g.channels_last)
                forward_rows<RELU>(from, to, k.positions, k.channels, scales, shifts);
            else
                forward_run<RELU>(from.data, to.data, k.positions, scales[c], shifts[c]);
            out_tiles.written(k);
        });
    });
}

// A run of one channel; sums[0] = sum of grad_y * x, sums[1] = sum of grad_y.
template <bool RELU, class T, class A>
void backward_run(const T* grad, const T* x, T* grad_x, int64_t count, A scale, A shift, A* sums) {
    constexpr int64_t L = LANES<A>, unroll = 4;
    const Vec<A> s = broadcast(scale), t = broadcast(shift);
    Vec<A> of_scale[unroll] = {}, of_shift[unroll] = {};
    const auto step = [&](int u, Vec<A> grad_, Vec<A> x_) {
        const Vec<A> grad_y = masked<RELU, A>(grad_, x_, s, t);
        of_scale[u] += grad_y * x_, of_shift[u] += grad_y;
        return grad_y * s;
    };
    int64_t i = 0;
    for (; i + unroll * L <= count; i += unroll * L)
#pragma GCC unroll 4
        for (int u = 0; u < unroll; ++u)
            store(grad_x + i + u * L, step(u, load(grad + i + u * L), load(x + i + u * L)));
    for (; i + L <= count; i += L) store(grad_x + i, step(0, load(grad + i), load(x + i)));
    if (i < count)  // lanes beyond the end have no gradient
        store_part(grad_x + i, step(0, load_part(grad + i, count - i), load_part(x + i, count - i)), count - i);
    sums[0] = sum<A>((of_scale[0] + of_scale[1]) + (of_scale[2] + of_scale[3]));
    sums[1] = sum<A>((of_shift[0] + of_shift[1]) + (of_shift[2] + of_shift[3]));
}

// ROWS rows of one vector of columns.
template <bool RELU, int ROWS, bool PART, class T, class A>
inline void backward_columns(Tile<T> grad, Tile<T> x, Tile<T> grad_x, int64_t count, const A* scale, const A* shift,
                             A* grad_scale, A* grad_shift) {
    const Vec<A> s = load(scale), t = load(shift);
    Vec<A> of_scale = {}, of_shift = {};
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
        const Vec<A> x_ = load_columns<PART>(x.data + r * x.pitch, count);
        const Vec<A> grad_y = masked<RELU, A>(load_columns<PART>(grad.data + r * grad.pitch, count), x_, s, t);
        of_scale += grad_y * x_, of_shift += grad_y;
        store_columns<PART>(grad_x.data + r * grad_x.pitch, grad_y * s, count);
    }
    store(grad_scale, load(grad_scale) + of_scale);
    store(grad_shift, load(grad_shift) + of_shift);
}

template <bool RELU, int ROWS, class T, class A>
void backward_row_block(Tile<T> grad, Tile<T> x, Tile<T> grad_x, int64_t columns, const A* scale, const A* shift,
                        A* grad_scale, A* grad_shift) {
    constexpr int64_t L = LANES<A>;
    int64_t c = 0;
    for (; c + L <= columns; c += L, grad.data += L, x.data += L, grad_x.data += L)
        backward_columns<RELU, ROWS, false>(grad, x, grad_x, L, scale + c, shift + c, grad_scale + c, grad_shift + c);
    if (c < columns)
        backward_columns<RELU, ROWS, true>(grad, x, grad_x, columns - c, scale + c, shift + c, grad_scale + c,
                                           grad_shift + c);
}

template <bool RELU, class T>
void backward(const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& grad_x,
              const Tensor& grad_scale, const Tensor& grad_shift) {
    using A = Arithmetic<T>;
    const ChannelGeometry g = make_channel_geometry<T>(x);
    const ChannelMap<T> grad_map = as_channel_map<T>(grad_out), x_map = as_channel_map<T>(x);
    const ChannelMap<T> out_map = as_channel_map<T>(grad_x);
    const int64_t per_piece = 2 * g.piece_channels;
    const Buffer<double> partial(g.pieces() * per_piece);  // [piece][of scale, of shift][channel]

    parallel_for(g.pieces(), [&](int64_t i) {
        const ChannelPiece p = make_channel_piece(g, i);
        const int64_t width = round_up(p.channels, LANES<A>);
        Arena arena(CHUNK_ELEMENTS * sizeof(T), CHUNK_ELEMENTS * sizeof(T), CHUNK_ELEMENTS * sizeof(T),
                    width * sizeof(A), width * sizeof(A), width * sizeof(A), width * sizeof(A));
        const Tiles<T> grad_tiles(g, grad_map, arena.take<T>(CHUNK_ELEMENTS));
        const Tiles<T> x_tiles(g, x_map, arena.take<T>(CHUNK_ELEMENTS));
        const Tiles<T> out_tiles(g, out_map, arena.take<T>(CHUNK_ELEMENTS));
        A* scales = arena.take<A>(width);
        A* shifts = arena.take<A>(width);
        A* of_scale = arena.take<A>(width);
        A* of_shift = arena.take<A>(width);
        copy_parameters(scale, p, width, scales);
        copy_parameters(shift, p, width, shifts);
        double* total_scale = partial.data + i * per_piece;
        double* total_shift = total_scale + g.piece_channels;
        for (int64_t c = 0; c < p.channels; ++c) total_scale[c] = total_shift[c] = 0;

        for_chunks(g, p, [&](const ChannelChunk& k) {
            Tile<T> grads = grad_tiles.read(k), from = x_tiles.read(k), to = out_tiles.at(k);
            const int64_t c0 = k.c0 - p.c0;
            if (g.channels_last) {
                for (int64_t c = 0; c < width; ++c) of_scale[c] = of_shift[c] = 0;
                const auto block = [&](auto rows) {
                    constexpr int ROWS = decltype(rows)::value;
                    backward_row_block<RELU, ROWS>(grads, from, to, k.channels, scales, shifts, of_scale, of_shift);
                    grads.data += ROWS * grads.pitch, from.data += ROWS * from.pitch, to.data += ROWS * to.pitch;
                };
                int64_t rows = k.positions;
                for (; rows >= 4; rows -= 4) block(Constant<4>{});
                for (; rows > 0; --rows) block(Constant<1>{});
                for (int64_t c = 0; c < k.channels; ++c) total_scale[c] += double(of_scale[c]);
                for (int64_t c = 0; c < k.channels; ++c) total_shift[c] += double(of_shift[c]);
            } else {
                A sums[2];
                backward_run<RELU>(grads.data, from.data, to.data, k.positions, scales[c0], shifts[c0], sums);
                total_scale[c0] += double(sums[0]), total_shift[c0] += double(sums[1]);
            }
            out_tiles.written(k);
        });
    });

    parallel_for(g.batch * g.channel_pieces, [&](int64_t group) {
        const int64_t sample = group / g.channel_pieces, channel_piece = group % g.channel_pieces;
        const int64_t c0 = channel_piece * g.piece_channels, channels = smaller(g.piece_channels, g.channels - c0);
        Arena arena(2 * channels * sizeof(double));
        double* totals = arena.take<double>(2 * channels);
        for (int64_t c = 0; c < 2 * channels; ++c) totals[c] = 0;
        for (int64_t j = 0; j < g.position_pieces; ++j) {
            const double* of_piece = partial.data + g.piece_of(sample, channel_piece, j) * per_piece;
            for (int64_t c = 0; c < channels; ++c) totals[c] += of_piece[c];
            for (int64_t c = 0; c < channels; ++c) totals[channels + c] += of_piece[g.piece_channels + c];
        }
        for (int64_t c = 0; c < channels; ++c) {
            element<A>(grad_scale, sample, c0 + c) = A(totals[c]);
            element<A>(grad_shift, sample, c0 + c) = A(totals[channels + c]);
        }
    });
}

}  // namespace

void scale_shift(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu, const Tensor& out) {
    for_storage(x.dtype, [&](auto type) {
        using T = decltype(type);
        relu ? forward<true, T>(x, scale, shift, out) : forward<false, T>(x, scale, shift, out);
    });
}

void scale_shift_backward(const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu,
                          const Tensor& grad_x, const Tensor& grad_scale, const Tensor& grad_shift) {
    for_storage(x.dtype, [&](auto type) {
        using T = decltype(type);
        relu ? backward<true, T>(grad_out, x, scale, shift, grad_x, grad_scale, grad_shift)
             : backward<false, T>(grad_out, x, scale, shift, grad_x, grad_scale, grad_shift);
    });
}

}  // namespace UTNETV2_ISA
}  // namespace utnetv2
