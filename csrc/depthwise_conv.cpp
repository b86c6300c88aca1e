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
// around it, in float whatever the storage type. On such a plane a tap is a constant offset, without edge cases.
//
// With channels-last maps a vector holds channels of one position, with all others positions of one channel. A tile is
// a run of vectors of output, beside each other with channels-last maps, below each other with others. Of three taps
// along it (TILE_TAPS) each vector that is loaded serves all, which leaves the rest of the taps, the lines:
//
//   out[r] += sum over lines and t < 3 of weight[line][t] * source[line][r + t]
//
// Kernels of other sizes take every tap as a line. While a tile is computed, what the next planes need is fetched: the
// lines of memory of a tile lie apart, which no processor foresees.
//
// Channels-last maps that no tap crosses the planes of (2D, or a kernel of 1 x B x C) are taken as planes of one row
// each, so that every row is copied in once here too.
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
// Bytes of one position's channels that a piece takes: positions lie a power of two apart, and single lines of them
// would fall on few sets of the caches and touch a page for little.
constexpr int64_t CHANNEL_BYTES = 256;
constexpr int64_t AHEAD = 16;                // positions between what is used and what is fetched, channels-last
constexpr int TILE = UTNETV2_VECTOR_BYTES == 64 ? 16 : 8;  // vectors of accumulators; their taps need registers too
constexpr int TILE_TAPS = 3;                 // along the axis of a tile: the kernels that networks have

struct Geometry {
    bool channels_last;    // channels vary fastest
    bool rows_are_planes;  // depth is the rows, height is 1, and slices are those that were planes
    int64_t batch, slices, channels, depth, height, width;
    int64_t taps_d, taps_h, taps_w;
    int64_t tile_taps;                 // of a line: TILE_TAPS or 1
    int64_t line_taps_h, line_taps_w;  // a plane's taps that are lines of their own
    int64_t lanes;                     // channels side by side in a vector: all lanes, or 1
    int64_t groups;                    // vectors of channels in a piece
    int64_t pitch;                     // positions from row to row of a plane
    int64_t band, slab;                // rows and planes of a piece's output
    int64_t bands, slabs, channel_pieces;

    int64_t pieces() const { return batch * slices * channel_pieces * slabs * bands; }
    int64_t taps() const { return taps_d * taps_h * taps_w; }
    int64_t plane_lines() const { return line_taps_h * line_taps_w; }
    int64_t lines() const { return taps_d * plane_lines(); }
    int64_t channels_of_piece() const { return lanes * groups; }
    // Vectors that have any of `channels`: in the last piece there may be fewer than `groups`, and the planes of the
    // others are never written.
    int64_t used_groups(int64_t channels) const { return divide_up(channels, lanes); }
    // Elements of a plane of `rows` rows; the slack is what the last vectors of a sweep reach beyond it.
    template <class A>
    int64_t plane(int64_t rows) const {
        const int64_t used = (rows * pitch + taps_w) * lanes + LANES<A>;
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
    // D, H and W of `sizes`.
    const auto depth = [&](const int64_t* sizes) { return x.dimensions == 5 ? sizes[2] : 1; };
    g.depth = depth(x.sizes), g.height = x.sizes[last - 1], g.width = x.sizes[last];
    g.taps_d = depth(weight.sizes), g.taps_h = weight.sizes[last - 1], g.taps_w = weight.sizes[last];
    g.rows_are_planes = g.channels_last && g.taps_d == 1;
    g.slices = 1;
    if (g.rows_are_planes) {
        g.slices = g.depth, g.depth = g.height, g.height = 1;
        g.taps_d = g.taps_h, g.taps_h = 1;
    }
    g.tile_taps = (g.channels_last ? g.taps_w : g.taps_h) == TILE_TAPS ? TILE_TAPS : 1;
    g.line_taps_h = g.channels_last ? g.taps_h : g.taps_h / g.tile_taps;
    g.line_taps_w = g.channels_last ? g.taps_w / g.tile_taps : g.taps_w;
    g.lanes = g.channels_last ? LANES<A> : 1;
    const int64_t most = CHANNEL_BYTES / int64_t(sizeof(T)) / g.lanes;
    g.groups = g.channels_last ? smaller(most, divide_up(g.channels, g.lanes)) : 1;
    g.pitch = g.width + g.taps_w - 1;
    g.channel_pieces = divide_up(g.channels, g.channels_of_piece());

    const int64_t row_bytes = g.taps_d * g.groups * g.pitch * g.lanes * int64_t(sizeof(A));
    const int64_t rows = larger(PLANES_BYTES / row_bytes - (g.taps_h - 1), int64_t(1));
    g.bands = divide_up(g.height, rows);
    const int64_t wanted = divide_up(PIECES, larger(g.batch * g.slices * g.channel_pieces * g.bands, int64_t(1)));
    // A cut repeats the planes or rows around it, so pieces stay several times as thick as what they repeat.
    g.slabs = clamp(wanted, 1, larger(g.depth / (4 * g.taps_d), int64_t(1)));
    if (g.depth == 1) g.bands = larger(g.bands, smaller(wanted, larger(g.height / (8 * g.taps_h), int64_t(1))));
    g.band = divide_up(g.height, g.bands), g.bands = divide_up(g.height, g.band);
    g.slab = divide_up(g.depth, g.slabs), g.slabs = divide_up(g.depth, g.slab);
    return g;
}

// A piece: its sample, slice, first channel, and output planes [z0, z1) and rows [y0, y1).
struct Piece {
    int64_t sample, slice, channel, channels, z0, z1, y0, y1;
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
    i /= g.slabs;
    p.slice = i % g.slices, p.sample = i / g.slices;
    return p;
}

// A tensor by its strides along the axes of a geometry.
template <class T>
struct Volumes : Map<T> {
    int64_t slice = 0;

    T* plane(const Piece& p, int64_t z) const {
        return this->data + p.sample * this->b + p.slice * slice + p.channel * this->c + z * this->d;
    }
    // The piece's rows in the plane that it needs next after those around plane z, up to `reach` planes on; behind its
    // last one that of the next piece, which has the next channels.
    const T* ahead(const Geometry& g, const Piece& p, int64_t z, int64_t reach) const {
        const int64_t next = z + reach + 1, rows = p.y0 * this->h;
        if (next < smaller(p.z1 + reach, g.depth)) return plane(p, next) + rows;
        return plane(p, larger(p.z0 - reach, int64_t(0))) + g.channels_of_piece() * this->c + rows;
    }
};

template <class T>
Volumes<T> as_volumes(const Geometry& g, const Tensor& t) {
    Volumes<T> v{as_map<T>(t)};
    if (g.rows_are_planes) v.slice = v.d, v.d = v.h, v.h = 0;
    return v;
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
void copy_row_in(const Geometry& g, const T* from, const Volumes<T>& map, const Prologue<A>& prologue, int64_t channels,
                 A* to, int64_t group) {
    const int64_t lanes = g.lanes;
    if (!g.channels_last) {
        int64_t x = 0;
        if (map.w == 1) {
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
void copy_row_out(const Geometry& g, const A* from, int64_t group, T* to, const Volumes<T>& map, int64_t channels) {
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

// Rows [y0, y0 + rows) of plane z, as far as they are in the map, `pitch` elements apart. What lies around them is
// never written, so that it stays the zeros that the piece began with.
template <class T, class A>
void copy_rows_in(const Geometry& g, const Volumes<T>& map, const Prologue<A>& prologue, const Piece& p, int64_t z,
                  int64_t y0, int64_t rows, A* to, int64_t pitch, int64_t group) {
    const T* plane = map.plane(p, z);
    for (int64_t y = larger(y0, int64_t(0)); y < smaller(y0 + rows, g.height); ++y)
        copy_row_in(g, plane + y * map.h, map, prologue, p.channels, to + (y - y0) * pitch, group);
}

// The planes around the current one, plane z at slot z mod taps_d, copied in as the window slides over them.
template <class T, class A>
struct Ring {
    const Geometry& g;
    const Volumes<T>& map;
    const Prologue<A>& prologue;
    const Piece& piece;
    A* memory;
    int64_t group;  // elements of one vector of channels' plane
    int64_t next;   // the first plane not copied in yet

    Ring(const Geometry& g, const Volumes<T>& map, const Prologue<A>& prologue, const Piece& piece, A* memory)
        : g(g), map(map), prologue(prologue), piece(piece), memory(memory),
          group(g.plane<A>(piece.rows() + g.taps_h - 1)) {
        next = larger(piece.z0 - g.taps_d / 2, int64_t(0));
        for (int64_t i = 0; i < g.taps_d * g.groups; ++i) zero_surroundings(memory + i * group);
    }
    static int64_t elements(const Geometry& g) { return g.taps_d * g.groups * g.plane<A>(g.band + g.taps_h - 1); }

    // What `copy_rows_in` leaves of a plane: rows outside the map, what lies between rows, the slack. Whole vectors
    // reach into the rows, which are not there yet.
    void zero_surroundings(A* plane) const {
        const int64_t rows = piece.rows() + g.taps_h - 1, row = g.pitch * g.lanes;
        const int64_t between = (g.taps_w - 1) * g.lanes, behind = (g.taps_w / 2 + g.width) * g.lanes;
        const auto zero = [](A* to, int64_t count) {
            for (int64_t i = 0; i < count; i += LANES<A>) store(to + i, Vec<A>{});
        };
        zero(plane, between);
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t y = piece.y0 - g.taps_h / 2 + i;
            if (y < 0 || y >= g.height) zero(plane + i * row, row);
            zero(plane + i * row + behind, between);
        }
        fill_zero(plane + rows * row, group - rows * row);
    }

    void reach(int64_t z) {
        const int64_t row = g.pitch * g.lanes;
        for (; next <= z + g.taps_d / 2 && next < g.depth; ++next)
            copy_rows_in(g, map, prologue, piece, next, piece.y0 - g.taps_h / 2, piece.rows() + g.taps_h - 1,
                         slot(next) + g.taps_w / 2 * g.lanes, row, group);
    }
    A* slot(int64_t z) const { return memory + z % g.taps_d * g.groups * group; }
};

// Elements from one vector of a tile to the next: in a plane, in the output, in the map that the planes are copied
// from.
struct Step {
    int64_t plane, out, in;
};

// COUNT vectors of output along a tile's axis:
//   out[r] = start + sum over lines and t < TAPS of weight[line][t] * source[line][r + t]
// `in_ahead` and `out_ahead` are where the same vectors of the next planes are read from and written to.
template <int COUNT, int TAPS, class T, class S, class A>
inline void correlate_tile(Vec<A> start, int64_t lines, const A* const* source, const A* weight, int64_t j,
                           const Step& step, S* out, int64_t elements, const T* in_ahead, const S* out_ahead) {
    Vec<A> total[COUNT];
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; ++r) {
        total[r] = start;
        __builtin_prefetch(in_ahead + r * step.in, 0, 2);
        __builtin_prefetch(out_ahead + r * step.out, 1, 2);
    }
    for (int64_t line = 0; line < lines; ++line, weight += TAPS * LANES<A>) {
        Vec<A> w[TAPS];
#pragma GCC unroll 4
        for (int t = 0; t < TAPS; ++t) w[t] = load(weight + t * LANES<A>);
        const A* from = source[line] + j;
#pragma GCC unroll 32
        for (int r = 0; r < COUNT + TAPS - 1; ++r) {
            Vec<A> in = load(from + r * step.plane);
            if (TAPS > 1) keep_in_register<A>(in);
#pragma GCC unroll 4
            for (int t = 0; t < TAPS; ++t)
                if (r - t >= 0 && r - t < COUNT) total[r - t] += w[t] * in;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < COUNT; ++r)
        if (elements == LANES<A>)
            store(out + r * step.out, total[r]);
        else
            store_part(out + r * step.out, total[r], elements);
}

// Tiles along their axis, from vector x to `count`: of COUNT vectors, the last one overlapping the one before, unless
// what is left fills less than half of it.
template <int COUNT, int TAPS, class T, class S, class A>
void correlate_run(Vec<A> start, int64_t lines, const A* const* source, const A* weight, int64_t j, const Step& step,
                   int64_t x, int64_t count, S* out, int64_t elements, const T* in_ahead, const S* out_ahead) {
    for (; count >= COUNT && count - x > COUNT / 2; x += COUNT) {
        const int64_t at = smaller(x, count - COUNT);
        correlate_tile<COUNT, TAPS>(start, lines, source, weight, j + at * step.plane, step, out + at * step.out,
                                    elements, in_ahead + at * step.in, out_ahead + at * step.out);
    }
    if constexpr (COUNT > 1)
        if (x < count)
            correlate_run<COUNT / 2, TAPS>(start, lines, source, weight, j, step, x, count, out, elements, in_ahead,
                                           out_ahead);
}

// A plane of the output for one vector of channels, or for one channel. `h` and `w` are from row to row and from
// position to position of it.
template <int TAPS, class T, class S, class A>
void correlate_plane(const Geometry& g, const Piece& p, Vec<A> start, int64_t lines, const A* const* source,
                     const A* weight, S* out, int64_t h, int64_t w, int64_t channels, const S* out_ahead,
                     const Volumes<T>& from, const T* in_ahead) {
    constexpr int64_t L = LANES<A>;
    if (g.channels_last) {
        const Step step{L, w, from.w};
        for (int64_t y = 0; y < p.rows(); ++y)
            correlate_run<TILE, TAPS>(start, lines, source, weight, y * g.pitch * L, step, 0, g.width, out + y * h,
                                      channels, in_ahead + y * from.h, out_ahead + y * h);
        return;
    }
    const Step step{g.pitch, h, from.h};
    for (int64_t x = 0; x < g.width; x += L) {
        const int64_t at = larger(smaller(x, g.width - L), int64_t(0));
        correlate_run<TILE, TAPS>(start, lines, source, weight, at, step, 0, p.rows(), out + at, smaller(g.width, L),
                                  in_ahead + at, out_ahead + at);
    }
}

// total[line][t] += sum over i of grad[i] * source[line][i + t], for LINES lines and vectors i of `columns` runs side
// by side, which start at multiples j of LANES. Behind a run of `grad` lie TAPS - 1 vectors of zeros. `meanwhile` is
// called for every i and j.
template <int LINES, int TAPS, class A, class F>
void accumulate_lines(const A* const* source, int64_t step, const A* grad, int64_t grad_step, int64_t run,
                      int64_t columns, double* total, const F& meanwhile) {
    Vec<A> products[LINES][TAPS] = {};
    for (int64_t j = 0; j < columns * LANES<A>; j += LANES<A>) {
        Vec<A> last[TAPS] = {};  // last[t] = grad[i - t]
        for (int64_t i = 0; i < run + TAPS - 1; ++i) {
            meanwhile(i, j);
#pragma GCC unroll 4
            for (int t = TAPS - 1; t > 0; --t) last[t] = last[t - 1];
            last[0] = load(grad + j + i * grad_step);
#pragma GCC unroll 16
            for (int line = 0; line < LINES; ++line) {
                Vec<A> in = load(source[line] + j + i * step);
                if (TAPS > 1) keep_in_register<A>(in);
#pragma GCC unroll 4
                for (int t = 0; t < TAPS; ++t) products[line][t] += last[t] * in;
            }
        }
    }
    for (int line = 0; line < LINES; ++line)
        for (int t = 0; t < TAPS; ++t, total += LANES<A>)
            for (int64_t i = 0; i < LANES<A>; ++i) total[i] += products[line][t][i];
}

template <int LINES, int TAPS, class A, class F>
void accumulate(int64_t lines, const A* const* source, int64_t step, const A* grad, int64_t grad_step, int64_t run,
                int64_t columns, double* total, const F& meanwhile) {
    if (lines >= LINES) {
        accumulate_lines<LINES, TAPS>(source, step, grad, grad_step, run, columns, total, meanwhile);
        lines -= LINES, source += LINES, total += LINES * TAPS * LANES<A>;
        const auto nothing = [](int64_t, int64_t) {};
        for (; lines >= LINES; lines -= LINES, source += LINES, total += LINES * TAPS * LANES<A>)
            accumulate_lines<LINES, TAPS>(source, step, grad, grad_step, run, columns, total, nothing);
    }
    if constexpr (LINES > 1)
        if (lines > 0)
            accumulate<LINES - 1, TAPS>(lines, source, step, grad, grad_step, run, columns, total, meanwhile);
}

// Points `source` to what every line whose plane exists meets first, for output plane z and a vector of channels.
// Returns the first of these lines.
template <class T, class A>
int64_t find_lines(const Geometry& g, const Ring<T, A>& ring, int64_t z, int64_t group, const A** source,
                   int64_t* count) {
    const int64_t first = larger(g.taps_d / 2 - z, int64_t(0)), last = smaller(g.depth - z + g.taps_d / 2, g.taps_d);
    const A** next = source;
    for (int64_t a = first; a < last; ++a) {
        const A* plane = ring.slot(z + a - g.taps_d / 2) + group * ring.group;
        for (int64_t b = 0; b < g.line_taps_h; ++b)
            for (int64_t c = 0; c < g.line_taps_w; ++c) *next++ = plane + (b * g.pitch + c) * g.lanes;
    }
    *count = next - source;
    return first * g.plane_lines();
}

// Calls visit(i, a, b, c) for every tap, i counting them line by line.
template <class F>
void for_taps(const Geometry& g, const F& visit) {
    int64_t i = 0;
    for (int64_t a = 0; a < g.taps_d; ++a)
        for (int64_t b = 0; b < g.line_taps_h; ++b)
            for (int64_t c = 0; c < g.line_taps_w; ++c)
                for (int64_t t = 0; t < g.tile_taps; ++t, ++i)
                    visit(i, a, g.channels_last ? b : b + t, g.channels_last ? c + t : c);
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
    const Volumes<T> from = as_volumes<T>(g, x), to = as_volumes<T>(g, out);
    const bool straight = g.channels_last ? to.c == 1 : to.w == 1;

    parallel_for(g.pieces(), [&](int64_t i) {
        const Piece p = make_piece(g, i);
        const int64_t plane = g.plane<A>(p.rows());
        Arena arena(Ring<T, A>::elements(g) * sizeof(A), g.groups * plane * sizeof(A),
                    g.groups * g.taps() * L * sizeof(A), g.groups * L * sizeof(A), g.lines() * sizeof(A*),
                    2 * g.groups * L * sizeof(A));
        A* planes = arena.take<A>(Ring<T, A>::elements(g));
        A* result = arena.take<A>(g.groups * plane);
        A* weights = arena.take<A>(g.groups * g.taps() * L);  // [group][line][tap of it][lane]
        A* starts = arena.take<A>(g.groups * L);
        const A** sources = arena.take<const A*>(g.lines());

        const Volumes<T> tap = as_volumes<T>(g, weight);
        for (int64_t within = 0; within < g.channels_of_piece(); ++within) {
            const int64_t c = p.channel + within, k = within / g.lanes, lane = within % g.lanes;
            const bool exists = within < p.channels;
            const auto set = [&](A* vector, A value) {
                if (g.channels_last)
                    vector[lane] = value;
                else
                    store(vector, broadcast(value));
            };
            for_taps(g, [&](int64_t i, int64_t a, int64_t b, int64_t e) {
                set(weights + (k * g.taps() + i) * L, exists ? to_arithmetic(tap(c, 0, a, b, e)) : A(0));
            });
            const bool biased = bias && exists;
            set(starts + k * L, biased ? to_arithmetic(static_cast<T*>(bias->data)[c * bias->strides[0]]) : A(0));
        }

        const Prologue<A> prologue = make_prologue(g, p, scale, shift, relu, arena.take<A>(2 * g.groups * L));
        Ring<T, A> ring(g, from, prologue, p, planes);
        for (int64_t z = p.z0; z < p.z1; ++z) {
            ring.reach(z);
            T* rows = to.plane(p, z) + p.y0 * to.h;
            const T* in_ahead = from.ahead(g, p, z, g.taps_d / 2);
            const T* out_ahead = g.channels_last ? rows + AHEAD * to.w : to.ahead(g, p, z, 0);
            for (int64_t k = 0; k < g.used_groups(p.channels); ++k) {
                int64_t lines;
                const int64_t first = find_lines(g, ring, z, k, sources, &lines);
                const A* w = weights + (k * g.taps() + first * g.tile_taps) * L;
                const Vec<A> start = load(starts + k * L);
                const int64_t channels = smaller(p.channels - k * L, L);
                const auto correlate = [&](auto taps) {
                    constexpr int TAPS = decltype(taps)::value;
                    if (straight)
                        correlate_plane<TAPS>(g, p, start, lines, sources, w, rows + k * L, to.h, to.w, channels,
                                              out_ahead + k * L, from, in_ahead + k * L);
                    else
                        correlate_plane<TAPS>(g, p, start, lines, sources, w, result + k * plane, g.pitch * g.lanes,
                                              g.lanes, L, result, from, in_ahead);
                };
                if (g.tile_taps == TILE_TAPS)
                    correlate(Constant<TILE_TAPS>{});
                else
                    correlate(Constant<1>{});
            }
            for (int64_t y = 0; y < p.rows() && !straight; ++y)
                copy_row_out(g, result + y * g.pitch * g.lanes, plane, rows + y * to.h, to, p.channels);
        }
    });
}

template <class T>
void backward_weight(const Tensor& grad_out, const Tensor& x, const Tensor* scale, const Tensor* shift, bool relu,
                     const Tensor& grad_weight) {
    using A = Arithmetic<T>;
    constexpr int64_t L = LANES<A>;
    const Geometry g = make_geometry<T>(x, grad_weight);
    const Volumes<T> grad = as_volumes<T>(g, grad_out), from = as_volumes<T>(g, x);
    const int64_t sums = g.groups * g.taps() * L;                 // [group][line][tap of it][lane]
    const int64_t per_piece = g.channels_last ? sums : g.taps();  // the lanes of a channel are put together there
    const Buffer<double> partial(g.pieces() * per_piece);
    // Runs of `accumulate`: with channels-last maps one of all positions of a plane, zeros between its rows; else
    // columns of a vector's width.
    const int64_t columns = g.channels_last ? 1 : divide_up(g.width, L);
    const int64_t grad_pitch = g.channels_last ? g.pitch * L : columns * L;

    parallel_for(g.pieces(), [&](int64_t i) {
        const Piece p = make_piece(g, i);
        const int64_t run = g.channels_last ? p.rows() * g.pitch : p.rows(), step = g.channels_last ? L : g.pitch;
        const int64_t grad_step = g.channels_last ? L : grad_pitch;
        const int64_t grad_plane = (run + g.tile_taps) * grad_step;
        Arena arena(Ring<T, A>::elements(g) * sizeof(A), g.groups * grad_plane * sizeof(A), g.lines() * sizeof(A*),
                    sums * sizeof(double), 2 * g.groups * L * sizeof(A));
        A* planes = arena.take<A>(Ring<T, A>::elements(g));
        A* grads = arena.take<A>(g.groups * grad_plane);
        const A** sources = arena.take<const A*>(g.lines());
        double* totals = arena.take<double>(sums);
        fill_zero(totals, sums);
        fill_zero(grads, g.groups * grad_plane);

        const Prologue<A> prologue = make_prologue(g, p, scale, shift, relu, arena.take<A>(2 * g.groups * L));
        Ring<T, A> ring(g, from, prologue, p, planes);
        for (int64_t z = p.z0; z < p.z1; ++z) {
            ring.reach(z);
            copy_rows_in(g, grad, Prologue<A>{}, p, z, p.y0, p.rows(), grads, grad_pitch, grad_plane);
            const T *x_ahead = from.ahead(g, p, z, g.taps_d / 2), *grad_ahead = grad.ahead(g, p, z, 0);
            for (int64_t k = 0; k < g.used_groups(p.channels); ++k) {
                int64_t lines;
                const int64_t first = find_lines(g, ring, z, k, sources, &lines);
                double* total = totals + (k * g.taps() + first * g.tile_taps) * L;
                const A* grad_of = grads + k * grad_plane;
                const auto sum_up = [&](const auto& meanwhile) {
                    if (g.tile_taps == TILE_TAPS)
                        accumulate<9 / TILE_TAPS, TILE_TAPS>(lines, sources, step, grad_of, grad_step, run, columns,
                                                             total, meanwhile);
                    else
                        accumulate<9, 1>(lines, sources, step, grad_of, grad_step, run, columns, total, meanwhile);
                };
                if (g.channels_last)
                    sum_up([](int64_t, int64_t) {});
                else
                    sum_up([&](int64_t i, int64_t j) {
                        __builtin_prefetch(x_ahead + i * from.h + j, 0, 2);
                        __builtin_prefetch(grad_ahead + i * grad.h + j, 0, 2);
                    });
            }
        }
        double* to = partial.data + i * per_piece;
        for (int64_t t = 0; t < sums; ++t)
            if (g.channels_last)
                to[t] = totals[t];
            else
                to[t / L] = t % L == 0 ? totals[t] : to[t / L] + totals[t];
    });

    const Volumes<T> tap = as_volumes<T>(g, grad_weight);
    parallel_for(g.channels, [&](int64_t c) {
        const int64_t within = c % g.channels_of_piece(), group = within / g.lanes;
        for_taps(g, [&](int64_t t, int64_t a, int64_t b, int64_t e) {
            const int64_t at = g.channels_last ? (group * g.taps() + t) * L + within % g.lanes : t;
            double total = 0;  // of the pieces of the same channels, in their order
            for (int64_t i = c / g.channels_of_piece(); i < g.pieces(); i += g.channel_pieces)
                total += partial.data[i * per_piece + at];
            tap(c, 0, a, b, e) = from_arithmetic<T>(A(total));
        });
    });
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
