// Depthwise convolution, 2D and 3D, stride 1, zero 'same' padding: every channel with its own kernel.
//
//   out[z, y, x] = bias + sum over taps (a, b, c) of weight[a, b, c] * in[z + a - A/2, y + b - B/2, x + c - C/2]
// where in, given a scale and a shift of every sample and channel, is [ReLU](x * scale + shift): a normalisation in
// front costs nothing here and is nowhere written to memory. And
//
//   grad_weight[a, b, c] = sum over (z, y, x) of grad_out[z, y, x] * in[z + a - A/2, y + b - B/2, x + c - C/2]
//
// The roof is memory: at 27 taps there are 7 operations per byte of float32. So every element is read from memory once.
// A piece of work is a group of channels times a slab of planes times a band of rows. It slides along the planes with a
// ring of the A planes that the taps reach, each copied into thread-owned memory that fits the second cache, with zeros
// around it, in float whatever the storage type. On such a plane a tap is a constant offset, so that
//
//   out[j] += weight[t] * plane[j + offset[t]]
//
// runs with eight vectors of accumulators and no edge cases. With channels-last maps a vector holds channels of one
// position, and what a row gives goes straight into the output. With all others a vector holds positions of one
// channel: the range runs on from row to row, and what it computes between them is not copied out.
//
// A channels-last map in 2D is taken as planes of one row each, so that every row is copied in once here too. A piece
// has few channels of every position, and what it needs next lies far apart in memory: no processor foresees that, and
// so it is fetched ahead.
#include "kernel_tools.hpp"
#include "kernels.hpp"
#include "map.hpp"
#include "parallel.hpp"
#include "vector.hpp"

namespace utnetv2 {
namespace UTNETV2_ISA {
namespace {

constexpr int64_t PLANES_BYTES = 384 << 10;  // of the planes of a piece: most of a second cache of today's smaller ones
constexpr int64_t PIECES = 32;               // at least, where the shape allows: enough for many threads
constexpr int64_t LINE = 64;                 // bytes of a cache line
// Bytes of one position's channels that a piece takes: positions lie a power of two apart, and single lines of them
// would fall on few sets of the caches and touch a page for little.
constexpr int64_t CHANNEL_BYTES = 256;
constexpr int64_t AHEAD = 16;                // positions between what is used and what is fetched, channels-last
constexpr int64_t UNROLL = 8;                // vectors of accumulators: products take four cycles, two start in each

struct Geometry {
    bool channels_last;    // channels vary fastest
    bool rows_are_planes;  // of a map in 2D
    int64_t batch, channels, depth, height, width;
    int64_t taps_d, taps_h, taps_w;
    int64_t lanes;       // channels side by side in a vector: all lanes, or 1
    int64_t groups;      // vectors of channels in a piece
    int64_t pitch;       // positions from row to row of a plane
    int64_t band, slab;  // rows and planes of a piece's output
    int64_t bands, slabs, channel_pieces;

    int64_t pieces() const { return batch * channel_pieces * slabs * bands; }
    int64_t taps() const { return taps_d * taps_h * taps_w; }
    int64_t channels_of_piece() const { return lanes * groups; }
    // Vectors that have any of `channels`: in the last piece there may be fewer than `groups`, and the planes of the
    // others are never written.
    int64_t used_groups(int64_t channels) const { return divide_up(channels, lanes); }
    // Elements of a plane of `rows` rows; the slack is what the last vectors of a sweep reach beyond it.
    template <class A>
    int64_t plane(int64_t rows) const {
        const int64_t used = (rows * pitch + taps_w) * lanes + UNROLL * LANES<A>;
        return divide_up(used, LANES<A>) * LANES<A>;
    }
};

template <class T>
Geometry make_geometry(const Tensor& x, const Tensor& weight) {
    using A = Arithmetic<T>;
    Geometry g;
    const int last = x.dimensions - 1;
    g.batch = x.sizes[0], g.channels = x.sizes[1];
    g.channels_last = x.strides[1] == 1 && x.strides[last] != 1 && g.channels > 1;
    g.rows_are_planes = g.channels_last && x.dimensions == 4;
    // D, H and W of `sizes`.
    const auto depth = [&](const int64_t* sizes) { return x.dimensions == 5 || g.rows_are_planes ? sizes[2] : 1; };
    const auto height = [&](const int64_t* sizes) { return g.rows_are_planes ? 1 : sizes[last - 1]; };
    g.depth = depth(x.sizes), g.height = height(x.sizes), g.width = x.sizes[last];
    g.taps_d = depth(weight.sizes), g.taps_h = height(weight.sizes), g.taps_w = weight.sizes[last];
    g.lanes = g.channels_last ? LANES<A> : 1;
    const int64_t most = CHANNEL_BYTES / int64_t(sizeof(T)) / g.lanes;
    g.groups = g.channels_last ? smaller(most, divide_up(g.channels, g.lanes)) : 1;
    g.pitch = g.width + g.taps_w - 1;
    g.channel_pieces = divide_up(g.channels, g.channels_of_piece());

    const int64_t row_bytes = g.taps_d * g.groups * g.pitch * g.lanes * int64_t(sizeof(A));
    const int64_t rows = larger(PLANES_BYTES / row_bytes - (g.taps_h - 1), int64_t(1));
    g.bands = divide_up(g.height, rows);
    const int64_t wanted = divide_up(PIECES, larger(g.batch * g.channel_pieces * g.bands, int64_t(1)));
    // A cut repeats the planes or rows around it, so pieces stay several times as thick as what they repeat.
    g.slabs = clamp(wanted, 1, larger(g.depth / (4 * g.taps_d), int64_t(1)));
    if (g.depth == 1) g.bands = larger(g.bands, smaller(wanted, larger(g.height / (8 * g.taps_h), int64_t(1))));
    g.band = divide_up(g.height, g.bands), g.bands = divide_up(g.height, g.band);
    g.slab = divide_up(g.depth, g.slabs), g.slabs = divide_up(g.depth, g.slab);
    return g;
}

// A tensor by its strides along the axes of `g`.
template <class T>
Map<T> as_map_of(const Geometry& g, const Tensor& t) {
    Map<T> map = as_map<T>(t);
    if (g.rows_are_planes) map.d = map.h, map.h = 0;
    return map;
}

// A piece: its sample, first channel, and output planes [z0, z1) and rows [y0, y1).
struct Piece {
    int64_t sample, channel, channels, z0, z1, y0, y1;
    int64_t rows() const { return y1 - y0; }
};

Piece make_piece(const Geometry& g, int64_t i) {
    // Channels vary fastest, so that threads at work together share the lines that channels of one position share.
    Piece p;
    p.channel = i % g.channel_pieces * g.channels_of_piece(), i /= g.channel_pieces;
    p.channels = smaller(g.channels_of_piece(), g.channels - p.channel);
    p.y0 = i % g.bands * g.band, i /= g.bands;
    p.y1 = smaller(p.y0 + g.band, g.height);
    p.z0 = i % g.slabs * g.slab;
    p.z1 = smaller(p.z0 + g.slab, g.depth);
    p.sample = i / g.slabs;
    return p;
}

// What is applied to the elements of a piece as they are copied in, for every channel of a piece; nothing without
// `scale`.
template <class A>
struct Prologue {
    A *scale = nullptr, *shift = nullptr;  // (groups, LANES), or the one channel's, broadcast
    bool relu = false;

    Vec<A> operator()(Vec<A> x, int64_t group) const {
        if (!scale) return x;
        x = x * load(scale + group * LANES<A>) + load(shift + group * LANES<A>);
        return relu ? maximum<A>(x, Vec<A>{}) : x;
    }
    A operator()(A x, int64_t group, int64_t lane) const {
        if (!scale) return x;
        x = x * scale[group * LANES<A> + lane] + shift[group * LANES<A> + lane];
        return relu && !(x > 0) && x == x ? A(0) : x;
    }
};

// One row of positions; vectors of channels go to planes `group` elements apart.
template <class T, class A>
void copy_row_in(const Geometry& g, const T* from, const Map<T>& map, const Prologue<A>& prologue, int64_t channels,
                 A* to, int64_t group) {
    const int64_t lanes = g.lanes;
    if (!g.channels_last) {
        int64_t x = 0;
        if (map.w == 1) {
            constexpr int64_t line = LINE / int64_t(sizeof(T));
            for (int64_t ahead = 0; ahead < g.width; ahead += line) __builtin_prefetch(from + map.d + ahead, 0, 2);
            for (; x + LANES<A> <= g.width; x += LANES<A>) store(to + x, prologue(load(from + x), 0));
            if (x < g.width && x > 0) {  // the last vector overlaps the one before
                x = g.width - LANES<A>;
                store(to + x, prologue(load(from + x), 0));
                x = g.width;
            }
        }
        for (; x < g.width; ++x) to[x] = prologue(to_arithmetic(from[x * map.w]), 0, 0);
    } else if (map.c == 1) {
        const int64_t full = channels / lanes, rest = channels % lanes;
        for (int64_t x = 0; x < g.width; ++x, from += map.w, to += lanes) {
            for (int64_t k = 0; k < full; ++k) {
                __builtin_prefetch(from + AHEAD * map.w + k * lanes, 0, 2);
                store(to + k * group, prologue(load(from + k * lanes), k));
            }
            if (rest) store(to + full * group, prologue(load_part(from + full * lanes, rest), full));
        }
    } else {
        for (int64_t c = 0; c < lanes * g.used_groups(channels); ++c) {
            A* lane = to + c / lanes * group + c % lanes;
            const T* channel = from + c * map.c;
            for (int64_t x = 0; x < g.width; ++x)
                lane[x * lanes] =
                    c < channels ? prologue(to_arithmetic(channel[x * map.w]), c / lanes, c % lanes) : A(0);
        }
    }
}

template <class T, class A>
void copy_row_out(const Geometry& g, const A* from, int64_t group, T* to, const Map<T>& map, int64_t channels) {
    const int64_t lanes = g.lanes;
    if (!g.channels_last) {
        int64_t x = 0;
        if (map.w == 1) {
            for (; x + LANES<A> <= g.width; x += LANES<A>) store(to + x, load(from + x));
            if (x < g.width && x > 0) {
                x = g.width - LANES<A>;
                store(to + x, load(from + x));
                x = g.width;
            }
        }
        for (; x < g.width; ++x) to[x * map.w] = from_arithmetic<T>(from[x]);
    } else {
        for (int64_t c = 0; c < channels; ++c) {
            const A* lane = from + c / lanes * group + c % lanes;
            for (int64_t x = 0; x < g.width; ++x) to[c * map.c + x * map.w] = from_arithmetic<T>(lane[x * lanes]);
        }
    }
}

// Rows [y0, y0 + rows) of plane z, as far as they are in the map, each behind `before` positions. What lies around them
// is never written, so that it stays the zeros that the piece began with.
template <class T, class A>
void copy_plane_in(const Geometry& g, const Map<T>& map, const Prologue<A>& prologue, const Piece& p, int64_t z,
                   int64_t y0, int64_t rows, int64_t before, A* to, int64_t group) {
    const T* plane = map.data + p.sample * map.b + p.channel * map.c + z * map.d;
    for (int64_t y = larger(y0, int64_t(0)); y < smaller(y0 + rows, g.height); ++y)
        copy_row_in(g, plane + y * map.h, map, prologue, p.channels, to + ((y - y0) * g.pitch + before) * g.lanes,
                    group);
}

// The planes around the current one, plane z at slot z mod taps_d, copied in as the window slides over them.
template <class T, class A>
struct Ring {
    const Geometry& g;
    const Map<T>& map;
    const Prologue<A>& prologue;
    const Piece& piece;
    A* memory;
    int64_t group;  // elements of one vector of channels' plane
    int64_t next;   // the first plane not copied in yet

    Ring(const Geometry& g, const Map<T>& map, const Prologue<A>& prologue, const Piece& piece, A* memory)
        : g(g), map(map), prologue(prologue), piece(piece), memory(memory),
          group(g.plane<A>(piece.rows() + g.taps_h - 1)) {
        next = larger(piece.z0 - g.taps_d / 2, int64_t(0));
        for (int64_t i = 0; i < g.taps_d * g.groups; ++i) zero_surroundings(memory + i * group);
    }
    static int64_t elements(const Geometry& g) { return g.taps_d * g.groups * g.plane<A>(g.band + g.taps_h - 1); }

    // What `copy_plane_in` leaves of a plane: rows outside the map, the ends of all rows, the slack.
    void zero_surroundings(A* plane) const {
        const int64_t rows = piece.rows() + g.taps_h - 1, row = g.pitch * g.lanes, before = g.taps_w / 2 * g.lanes;
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t y = piece.y0 - g.taps_h / 2 + i;
            if (y < 0 || y >= g.height) {
                fill_zero(plane + i * row, row);
            } else {
                fill_zero(plane + i * row, before);
                fill_zero(plane + i * row + before + g.width * g.lanes, before);
            }
        }
        fill_zero(plane + rows * row, group - rows * row);
    }

    void reach(int64_t z) {
        for (; next <= z + g.taps_d / 2 && next < g.depth; ++next)
            copy_plane_in(g, map, prologue, piece, next, piece.y0 - g.taps_h / 2, piece.rows() + g.taps_h - 1,
                          g.taps_w / 2, slot(next), group);
    }
    A* slot(int64_t z) const { return memory + z % g.taps_d * g.groups * group; }
};

// out[j] = start + sum over taps of weight[t] * source[t][j] for COUNT vectors of j.
template <int COUNT, class A>
inline void correlate_block(Vec<A> start, int64_t taps, const A* const* source, const A* weight, int64_t j, A* out) {
    Vec<A> total[COUNT];
    for (int r = 0; r < COUNT; ++r) total[r] = start;
    for (int64_t t = 0; t < taps; ++t) {
        const Vec<A> w = load(weight + t * LANES<A>);
        const A* from = source[t] + j;
#pragma GCC unroll 16
        for (int r = 0; r < COUNT; ++r) total[r] += w * load(from + r * LANES<A>);
    }
    for (int r = 0; r < COUNT; ++r) store(out + j + r * LANES<A>, total[r]);
}

// The same for COUNT positions of a channels-last output, `step` apart, of whose vector `channels` exist.
template <int COUNT, class T, class A>
inline void correlate_positions(Vec<A> start, int64_t taps, const A* const* source, const A* weight, int64_t j, T* out,
                                int64_t step, int64_t channels) {
    Vec<A> total[COUNT];
    for (int r = 0; r < COUNT; ++r) {
        total[r] = start;
        __builtin_prefetch(out + (r + AHEAD) * step, 1, 2);
    }
    for (int64_t t = 0; t < taps; ++t) {
        const Vec<A> w = load(weight + t * LANES<A>);
        const A* from = source[t] + j;
#pragma GCC unroll 16
        for (int r = 0; r < COUNT; ++r) total[r] += w * load(from + r * LANES<A>);
    }
    for (int r = 0; r < COUNT; ++r)
        if (channels == LANES<A>)
            store(out + r * step, total[r]);
        else
            store_part(out + r * step, total[r], channels);
}

// One row of a channels-last output; the last block overlaps the one before.
template <class T, class A>
void correlate_row(Vec<A> start, int64_t taps, const A* const* source, const A* weight, int64_t j, int64_t width,
                   T* out, int64_t step, int64_t channels) {
    const auto sweep = [&](auto count) {
        constexpr int64_t block = decltype(count)::value;
        for (int64_t x = 0; x < width; x += block) {
            const int64_t at = smaller(x, width - block);
            correlate_positions<block>(start, taps, source, weight, j + at * LANES<A>, out + at * step, step, channels);
        }
    };
    if (width >= UNROLL)
        sweep(Constant<UNROLL>{});
    else if (width >= UNROLL / 2)
        sweep(Constant<UNROLL / 2>{});
    else
        sweep(Constant<1>{});
}

template <class A>
void correlate(Vec<A> start, int64_t taps, const A* const* source, const A* weight, int64_t count, A* out) {
    constexpr int64_t step = LANES<A>;
    int64_t j = 0;
    for (; j + (UNROLL / 2) * step < count; j += UNROLL * step)
        correlate_block<UNROLL, A>(start, taps, source, weight, j, out);
    if (j < count) correlate_block<UNROLL / 2, A>(start, taps, source, weight, j, out);
}

// total[t] += sum over j of grad[j] * source[t][j], for COUNT taps.
template <int COUNT, class A>
void accumulate_block(const A* const* source, const A* grad, int64_t count, double* total) {
    Vec<A> products[COUNT] = {};
    for (int64_t j = 0; j < count; j += LANES<A>) {
        const Vec<A> g = load(grad + j);
#pragma GCC unroll 16
        for (int t = 0; t < COUNT; ++t) products[t] += g * load(source[t] + j);
    }
    for (int t = 0; t < COUNT; ++t)
        for (int64_t i = 0; i < LANES<A>; ++i) total[t * LANES<A> + i] += products[t][i];
}

template <class A>
void accumulate(int64_t taps, const A* const* source, const A* grad, int64_t count, double* total) {
    constexpr int64_t most = 9;
    while (taps > 0) {
        const int64_t block = smaller(taps, most);
        switch (block) {
            case 9: accumulate_block<9, A>(source, grad, count, total); break;
            case 8: accumulate_block<8, A>(source, grad, count, total); break;
            case 7: accumulate_block<7, A>(source, grad, count, total); break;
            case 6: accumulate_block<6, A>(source, grad, count, total); break;
            case 5: accumulate_block<5, A>(source, grad, count, total); break;
            case 4: accumulate_block<4, A>(source, grad, count, total); break;
            case 3: accumulate_block<3, A>(source, grad, count, total); break;
            case 2: accumulate_block<2, A>(source, grad, count, total); break;
            default: accumulate_block<1, A>(source, grad, count, total); break;
        }
        taps -= block, source += block, total += block * LANES<A>;
    }
}

// Calls visit(t, a, b, c) for all taps whose plane exists at output plane z; t counts them.
template <class F>
int64_t for_taps(const Geometry& g, int64_t z, const F& visit) {
    int64_t t = 0;
    for (int64_t a = 0; a < g.taps_d; ++a) {
        const int64_t plane = z + a - g.taps_d / 2;
        if (plane < 0 || plane >= g.depth) continue;
        for (int64_t b = 0; b < g.taps_h; ++b)
            for (int64_t c = 0; c < g.taps_w; ++c) visit(t++, a, b, c);
    }
    return t;
}

// The prologue of a piece's channels from scale and shift (B, C), in `memory` for 2 * groups vectors.
template <class A>
Prologue<A> make_prologue(const Geometry& g, const Piece& p, const Tensor* scale, const Tensor* shift, bool relu,
                          A* memory) {
    constexpr int64_t L = LANES<A>;
    if (!scale) return {};
    const Prologue<A> prologue{memory, memory + g.groups * L, relu};
    const auto value = [&](const Tensor& t, int64_t c) {
        return static_cast<const A*>(t.data)[p.sample * t.strides[0] + (p.channel + c) * t.strides[1]];
    };
    for (int64_t i = 0; i < g.groups * L; ++i) {
        const int64_t c = g.channels_last ? i : 0;
        prologue.scale[i] = c < p.channels ? value(*scale, c) : A(0);
        prologue.shift[i] = c < p.channels ? value(*shift, c) : A(0);
    }
    return prologue;
}

template <class T>
void forward(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor* scale, const Tensor* shift,
             bool relu, const Tensor& out) {
    using A = Arithmetic<T>;
    constexpr int64_t L = LANES<A>;
    const Geometry g = make_geometry<T>(x, weight);
    const Map<T> from = as_map_of<T>(g, x), to = as_map_of<T>(g, out);
    const bool straight = g.channels_last && to.c == 1;

    parallel_for(g.pieces(), [&](int64_t i) {
        const Piece p = make_piece(g, i);
        const int64_t plane = g.plane<A>(p.rows());
        Arena arena(Ring<T, A>::elements(g) * sizeof(A), g.groups * plane * sizeof(A),
                    g.groups * g.taps() * L * sizeof(A), g.taps() * L * sizeof(A), g.groups * L * sizeof(A),
                    g.taps() * sizeof(A*), 2 * g.groups * L * sizeof(A));
        A* planes = arena.take<A>(Ring<T, A>::elements(g));
        A* result = arena.take<A>(g.groups * plane);
        A* all_weights = arena.take<A>(g.groups * g.taps() * L);  // [group][tap][lane]
        A* weights = arena.take<A>(g.taps() * L);                 // of the taps in use
        A* starts = arena.take<A>(g.groups * L);
        const A** sources = arena.take<const A*>(g.taps());

        const Map<T> tap = as_map_of<T>(g, weight);
        for (int64_t k = 0; k < g.groups; ++k)
            for (int64_t lane = 0; lane < L; ++lane) {
                const int64_t within = k * g.lanes + (g.channels_last ? lane : 0), c = p.channel + within;
                const bool exists = within < p.channels;
                A* w = all_weights + k * g.taps() * L + lane;
                for (int64_t a = 0; a < g.taps_d; ++a)
                    for (int64_t b = 0; b < g.taps_h; ++b)
                        for (int64_t e = 0; e < g.taps_w; ++e, w += L)
                            *w = exists ? to_arithmetic(tap(c, 0, a, b, e)) : A(0);
                starts[k * L + lane] =
                    bias && exists ? to_arithmetic(static_cast<T*>(bias->data)[c * bias->strides[0]]) : A(0);
            }

        const Prologue<A> prologue = make_prologue(g, p, scale, shift, relu, arena.take<A>(2 * g.groups * L));
        Ring<T, A> ring(g, from, prologue, p, planes);
        for (int64_t z = p.z0; z < p.z1; ++z) {
            ring.reach(z);
            T* row = to.data + p.sample * to.b + p.channel * to.c + z * to.d + p.y0 * to.h;
            for (int64_t k = 0; k < g.used_groups(p.channels); ++k) {
                const int64_t used = for_taps(g, z, [&](int64_t t, int64_t a, int64_t b, int64_t c) {
                    sources[t] = ring.slot(z + a - g.taps_d / 2) + k * ring.group + (b * g.pitch + c) * g.lanes;
                    const int64_t tap = (a * g.taps_h + b) * g.taps_w + c;
                    store(weights + t * L, load(all_weights + (k * g.taps() + tap) * L));
                });
                const Vec<A> start = load(starts + k * L);
                if (straight) {
                    const int64_t channels = smaller(p.channels - k * L, L);
                    for (int64_t y = 0; y < p.rows(); ++y)
                        correlate_row<T, A>(start, used, sources, weights, y * g.pitch * L, g.width,
                                            row + y * to.h + k * L, to.w, channels);
                } else {
                    const int64_t count = ((p.rows() - 1) * g.pitch + g.width) * g.lanes;
                    correlate<A>(start, used, sources, weights, count, result + k * plane);
                }
            }
            for (int64_t y = 0; y < p.rows() && !straight; ++y)
                copy_row_out(g, result + y * g.pitch * g.lanes, plane, row + y * to.h, to, p.channels);
        }
    });
}

template <class T>
void backward_weight(const Tensor& grad_out, const Tensor& x, const Tensor* scale, const Tensor* shift, bool relu,
                     const Tensor& grad_weight) {
    using A = Arithmetic<T>;
    constexpr int64_t L = LANES<A>;
    const Geometry g = make_geometry<T>(x, grad_weight);
    const Map<T> grad = as_map_of<T>(g, grad_out), from = as_map_of<T>(g, x);
    const int64_t per_piece = g.groups * g.taps() * L;
    const Buffer<double> partial(g.pieces() * per_piece);  // [piece][group][tap][lane]

    parallel_for(g.pieces(), [&](int64_t i) {
        const Piece p = make_piece(g, i);
        const int64_t plane = g.plane<A>(p.rows());
        Arena arena(Ring<T, A>::elements(g) * sizeof(A), g.groups * plane * sizeof(A), g.taps() * sizeof(A*),
                    2 * g.groups * L * sizeof(A));
        A* planes = arena.take<A>(Ring<T, A>::elements(g));
        A* grads = arena.take<A>(g.groups * plane);
        const A** sources = arena.take<const A*>(g.taps());
        double* totals = partial.data + i * per_piece;
        fill_zero(totals, per_piece);
        fill_zero(grads, g.groups * plane);

        const Prologue<A> prologue = make_prologue(g, p, scale, shift, relu, arena.take<A>(2 * g.groups * L));
        Ring<T, A> ring(g, from, prologue, p, planes);
        for (int64_t z = p.z0; z < p.z1; ++z) {
            ring.reach(z);
            copy_plane_in(g, grad, Prologue<A>{}, p, z, p.y0, p.rows(), 0, grads, plane);
            const int64_t count = p.rows() * g.pitch * g.lanes;
            const int64_t first = larger(g.taps_d / 2 - z, int64_t(0)) * g.taps_h * g.taps_w;
            for (int64_t k = 0; k < g.used_groups(p.channels); ++k) {
                const int64_t used = for_taps(g, z, [&](int64_t t, int64_t a, int64_t b, int64_t c) {
                    sources[t] = ring.slot(z + a - g.taps_d / 2) + k * ring.group + (b * g.pitch + c) * g.lanes;
                });
                accumulate<A>(used, sources, grads + k * plane, count, totals + (k * g.taps() + first) * L);
            }
        }
    });

    const Map<T> tap = as_map_of<T>(g, grad_weight);
    // Pieces of the same channels, in their order; lanes too where they are positions of one channel.
    for (int64_t c = 0; c < g.channels; ++c) {
        const int64_t within = c % g.channels_of_piece(), group = within / g.lanes;
        for (int64_t t = 0; t < g.taps(); ++t) {
            double total = 0;
            for (int64_t i = c / g.channels_of_piece(); i < g.pieces(); i += g.channel_pieces) {
                const double* lanes = partial.data + i * per_piece + (group * g.taps() + t) * L;
                if (g.channels_last)
                    total += lanes[within % g.lanes];
                else
                    for (int64_t lane = 0; lane < L; ++lane) total += lanes[lane];
            }
            const int64_t a = t / (g.taps_h * g.taps_w), rest = t % (g.taps_h * g.taps_w);
            tap(c, 0, a, rest / g.taps_w, rest % g.taps_w) = from_arithmetic<T>(A(total));
        }
    }
}

}  // namespace

void depthwise_conv(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor* scale,
                    const Tensor* shift, bool relu, const Tensor& out) {
    for_storage(x.dtype, [&](auto type) { forward<decltype(type)>(x, weight, bias, scale, shift, relu, out); });
}

void depthwise_conv_backward_weight(const Tensor& grad_out, const Tensor& x, const Tensor* scale, const Tensor* shift,
                                    bool relu, const Tensor& grad_weight) {
    for_storage(x.dtype, [&](auto type) {
        backward_weight<decltype(type)>(grad_out, x, scale, shift, relu, grad_weight);
    });
}

}  // namespace UTNETV2_ISA
}  // namespace utnetv2
