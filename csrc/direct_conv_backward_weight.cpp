// Gradient of the weight of a dense convolution, 2D and 3D, stride 1, zero 'same' padding, tap by tap.
//
//   grad_weight[o, i, a, b, c] = sum over samples and (z, y, x) of
//                                grad_out[o, z, y, x] * in[i, z + a - A/2, y + b - B/2, x + c - C/2]
//
// The roof is arithmetic: an element of either map meets hundreds of others. For one tap this is a product of matrices
// whose depth is the positions, and the work is to feed it from cache with long, aligned runs. A piece of work is a
// tap a, a block of output channels, a block of input channels and a range of positions; the block of grad_weight it
// sums lies in the second cache. It goes through its positions chunk by chunk. A chunk is rows of a plane, or planes
// where they are small, copied to panels: x in panels of as many input channels as the product has rows, grad_out in
// panels of two vectors of output channels, positions in order, with zeros behind every row (and between planes). On
// such panels a tap (b, c) is a constant offset, so that the depth of a product is any run of positions, across rows:
//
//   sum[b, c, i, o] += sum over j of x[j + b * pitch + c][i] * grad[j][o]
//
// A run of grad_out's panel stays in the first cache while all taps and input channels meet it. Copying costs a load
// and a store for what taps * block / lanes products use, so that any layout of the maps will do.
#include "kernel_tools.hpp"
#include "kernels.hpp"
#include "map.hpp"
#include "parallel.hpp"
#include "product.hpp"
#include "vector.hpp"
#include "weight_block.hpp"

namespace utnetv2 {
namespace UTNETV2_ISA {
namespace {

constexpr int64_t SUMS_BYTES = 144 << 10;   // of a piece's block of grad_weight; with its chunk it fills the
constexpr int64_t CHUNK_BYTES = 256 << 10;  // second cache of today's smaller processors
constexpr int64_t RUN = 256;                // positions of a product: two panels of that length fit the first cache
constexpr int64_t PIECES = 32;              // at least, where the shape allows: enough for many threads
constexpr int64_t RANGE = 512;              // positions of a piece, at least: its sums are written and read again
constexpr int64_t BLOCK = 256;              // channels of a piece, at most
constexpr int64_t PANELS = 64;              // of a block, at most: they have four channels or more, the last ones aside

// How the channels of a block lie: panel k holds `width[k]` channels from `start[k]` on, for every position in turn.
struct Panels {
    int64_t count = 0, channels = 0;
    int64_t start[PANELS], width[PANELS];

    void add(int64_t channels_of_panel) {
        start[count] = channels, width[count++] = channels_of_panel;
        channels += channels_of_panel;
    }
    // Behind every panel there is room for a vector, which the last position's store may reach into.
    template <class A>
    A* at(A* memory, int64_t k, int64_t positions) const {
        return memory + start[k] * positions + k * LANES<A>;
    }
    template <class A>
    int64_t elements(int64_t positions) const {
        return channels * positions + count * LANES<A>;
    }
};

// Panels of PRODUCT_ROWS channels; what remains in panels of nearly equal width, none so narrow that the product waits
// for its own sums.
Panels row_panels(int64_t channels) {
    int64_t rest = channels % PRODUCT_ROWS;
    if (rest > 0 && rest < 3 && channels > PRODUCT_ROWS) rest += PRODUCT_ROWS;
    Panels panels;
    for (int64_t k = 0; k < (channels - rest) / PRODUCT_ROWS; ++k) panels.add(PRODUCT_ROWS);
    for (int64_t parts = divide_up(rest, 6); parts > 0; --parts) {
        const int64_t width = divide_up(rest, parts);
        panels.add(width), rest -= width;
    }
    return panels;
}

// Panels of two vectors, the last of one where that is enough.
template <class A>
Panels vector_panels(int64_t channels) {
    Panels panels;
    for (; channels > 0; channels -= 2 * LANES<A>) panels.add(channels > LANES<A> ? 2 * LANES<A> : LANES<A>);
    return panels;
}

struct Geometry {
    int64_t batch, outputs, inputs;  // channels
    int64_t depth, height, width;
    int64_t taps_d, taps_h, taps_w;
    int64_t output_block, input_block, output_blocks, input_blocks;
    int64_t chunk_planes, chunk_rows, chunks_of_plane;  // a chunk is several planes or rows of one
    int64_t chunks, chunks_of_piece, ranges;

    int64_t plane_taps() const { return taps_h * taps_w; }
    int64_t blocks() const { return taps_d * output_blocks * input_blocks; }
    // From row to row; the zeros behind a row are also those in front of the next one.
    int64_t pitch() const { return width + taps_w / 2; }
    int64_t rows_between() const { return taps_h / 2; }
    int64_t grad_rows(int64_t planes, int64_t rows) const { return planes * (rows + rows_between()) - rows_between(); }
    int64_t x_rows(int64_t planes, int64_t rows) const { return grad_rows(planes, rows) + 2 * rows_between(); }
    int64_t grad_positions() const { return grad_rows(chunk_planes, chunk_rows) * pitch(); }
    int64_t x_positions() const { return x_rows(chunk_planes, chunk_rows) * pitch() + taps_w / 2; }
};

// `channels` in nearly equal blocks of at most `limit`, each a multiple of `step`.
int64_t block_of(int64_t channels, int64_t limit, int64_t step) {
    const int64_t blocks = divide_up(channels, clamp(limit / step * step, step, BLOCK));
    return divide_up(divide_up(channels, blocks), step) * step;
}

template <class A>
Geometry make_geometry(const Tensor& x, const Tensor& weight) {
    Geometry g;
    const bool planar = x.dimensions == 4;
    const int last = x.dimensions - 1;
    g.batch = x.sizes[0], g.inputs = x.sizes[1], g.outputs = weight.sizes[0];
    g.depth = planar ? 1 : x.sizes[2], g.height = x.sizes[last - 1], g.width = x.sizes[last];
    g.taps_d = planar ? 1 : weight.sizes[2], g.taps_h = weight.sizes[last - 1], g.taps_w = weight.sizes[last];

    const int64_t sums = SUMS_BYTES / int64_t(sizeof(A)) / g.plane_taps();
    int64_t side = 1;
    while ((side + 1) * (side + 1) <= sums) ++side;
    g.output_block = block_of(g.outputs, larger(side, sums / g.inputs), 2 * LANES<A>);
    g.input_block = block_of(g.inputs, sums / smaller(g.output_block, g.outputs), 1);
    g.output_blocks = divide_up(g.outputs, g.output_block), g.input_blocks = divide_up(g.inputs, g.input_block);

    const int64_t planes = g.batch * g.depth, positions = planes * g.height * g.width;
    const int64_t wanted = clamp(divide_up(PIECES, g.blocks()), 1, larger(positions / RANGE, int64_t(1)));
    const int64_t x_row = g.pitch() * g.input_block * int64_t(sizeof(A));
    const int64_t grad_row = g.pitch() * g.output_block * int64_t(sizeof(A));
    const int64_t rows = clamp((CHUNK_BYTES - (g.taps_h - 1) * x_row) / (x_row + grad_row), 1, g.height);
    g.chunk_rows = divide_up(g.height, divide_up(g.height, rows));
    g.chunks_of_plane = divide_up(g.height, g.chunk_rows);
    g.chunk_planes = 1;
    if (g.chunks_of_plane == 1) {
        const int64_t plane = (g.height + g.rows_between()) * (x_row + grad_row);
        g.chunk_planes = clamp(CHUNK_BYTES / plane, 1, larger(planes / wanted, int64_t(1)));
    }
    g.chunks = divide_up(planes, g.chunk_planes) * g.chunks_of_plane;
    g.chunks_of_piece = divide_up(larger(g.chunks, int64_t(1)), wanted);
    g.ranges = larger(divide_up(g.chunks, g.chunks_of_piece), int64_t(1));
    return g;
}

// Rows [y0, y1) of the planes [plane, end), counted over all samples.
struct Chunk {
    int64_t plane, end, y0, y1;
};

Chunk make_chunk(const Geometry& g, int64_t i) {
    Chunk c;
    c.plane = i / g.chunks_of_plane * g.chunk_planes;
    c.end = smaller(c.plane + g.chunk_planes, g.batch * g.depth);
    c.y0 = i % g.chunks_of_plane * g.chunk_rows;
    c.y1 = smaller(c.y0 + g.chunk_rows, g.height);
    return c;
}

// One position's `count` panels of `WIDTH` channels, side by side in `from`, to panels `stride` apart.
template <int WIDTH, class T, class A>
inline void copy_panels(int64_t count, const T* from, A* to, int64_t stride) {
    for (int64_t k = 0; k < count; ++k, from += WIDTH, to += stride)
#pragma GCC unroll 4
        for (int64_t i = 0; i < WIDTH; i += LANES<A>) store(to + i, load(from + i));
}

// One row of vectors of channels, from position `at` of the panels on. FULL is the width of all panels but the last.
template <int FULL, class T, class A>
void copy_channels(int64_t positions, const T* from, int64_t step, int64_t channels, const Panels& panels, A* memory,
                   int64_t all_positions, int64_t at) {
    constexpr int64_t L = LANES<A>, reach = (FULL + L - 1) / L * L;
    int64_t full = 0;
    while (full < panels.count && panels.width[full] == FULL) ++full;
    for (int64_t x = 0; x < positions; ++x, from += step) {
        // A vector may reach beyond the channels, into the next position, if there is one: what it brings is not used.
        const int64_t readable = x + 1 < positions && step >= L ? channels + L - 1 : channels;
        int64_t k = readable < reach ? 0 : smaller((readable - reach) / FULL + 1, full);
        copy_panels<FULL>(k, from, memory + (at + x) * FULL, FULL * all_positions + L);
        for (; k < panels.count; ++k) {
            const int64_t width = panels.width[k];
            A* to = panels.at(memory, k, all_positions) + (at + x) * width;
            for (int64_t i = 0; i < width; i += L) {
                const int64_t left = readable - panels.start[k] - i;
                const T* vector = from + panels.start[k] + i;
                store(to + i, left >= L ? load(vector) : load_part(vector, larger(left, int64_t(0))));
            }
        }
    }
}

// One row of one channel to every `width`-th element.
template <class T, class A>
void copy_channel(int64_t positions, const T* from, int64_t step, A* to, int64_t width) {
    constexpr int64_t L = LANES<A>;
    int64_t x = 0;
    for (; step == 1 && x + L <= positions; x += L) {
        A lanes[L];
        store(lanes, load(from + x));
        for (int64_t lane = 0; lane < L; ++lane) to[(x + lane) * width] = lanes[lane];
    }
    for (; x < positions; ++x) to[x * width] = to_arithmetic(from[x * step]);
}

// One row, from position `at` of the panels on, and zeros behind it; only zeros without `from`. `channels` are those
// that the map has from the block's first one on.
template <int FULL, class T, class A>
void copy_row(const Geometry& g, const Map<T>& map, const T* from, int64_t channels, const Panels& panels, A* memory,
              int64_t positions, int64_t at) {
    const bool vectors_of_channels = map.c == 1 && panels.channels > 1;
    if (from && vectors_of_channels)
        copy_channels<FULL>(g.width, from, map.w, channels, panels, memory, positions, at);
    for (int64_t k = 0; k < panels.count; ++k) {
        const int64_t width = panels.width[k];
        A* row = panels.at(memory, k, positions) + at * width;
        for (int64_t i = 0; from && !vectors_of_channels && i < width; ++i) {
            const int64_t channel = panels.start[k] + i;
            if (channel < channels)
                copy_channel(g.width, from + channel * map.c, map.w, row + i, width);
            else
                for (int64_t x = 0; x < g.width; ++x) row[x * width + i] = 0;
        }
        const int64_t filled = from ? g.width : 0;
        fill_zero(row + filled * width, (g.pitch() - filled) * width);
    }
}

// The chunk of grad_out: its rows, with rows of zeros between planes.
template <class T, class A>
void copy_grad(const Geometry& g, const Map<T>& map, const WeightBlock& b, const Chunk& c, const Panels& panels,
               A* memory) {
    const int64_t positions = g.grad_positions();
    int64_t at = 0;
    for (int64_t plane = c.plane; plane < c.end; ++plane) {
        const T* from = map.data + plane / g.depth * map.b + plane % g.depth * map.d + b.output * map.c;
        if (plane > c.plane)
            for (int64_t y = 0; y < g.rows_between(); ++y, at += g.pitch())
                copy_row<2 * LANES<A>, T>(g, map, nullptr, 0, panels, memory, positions, at);
        for (int64_t y = c.y0; y < c.y1; ++y, at += g.pitch())
            copy_row<2 * LANES<A>>(g, map, from + y * map.h, g.outputs - b.output, panels, memory, positions, at);
    }
}

// The chunk of x that tap b.tap brings to that of grad_out, with the rows around it.
template <class T, class A>
void copy_x(const Geometry& g, const Map<T>& map, const WeightBlock& b, const Chunk& c, const Panels& panels,
            A* memory) {
    const int64_t positions = g.x_positions(), around = g.rows_between();
    for (int64_t k = 0; k < panels.count; ++k)
        fill_zero(panels.at(memory, k, positions), g.taps_w / 2 * panels.width[k]);
    int64_t at = g.taps_w / 2;
    for (int64_t plane = c.plane; plane < c.end; ++plane) {
        const int64_t z = plane % g.depth + b.tap - g.taps_d / 2;
        const bool exists = z >= 0 && z < g.depth;
        const T* from = map.data + plane / g.depth * map.b + z * map.d + b.input * map.c;
        // The rows behind a plane are those in front of the next one.
        const int64_t end = plane + 1 < c.end ? c.y1 : c.y1 + around;
        for (int64_t y = c.y0 - around; y < end; ++y, at += g.pitch()) {
            const T* row = exists && y >= 0 && y < g.height ? from + y * map.h : nullptr;
            copy_row<PRODUCT_ROWS>(g, map, row, g.inputs - b.input, panels, memory, positions, at);
        }
    }
}

// sums[b][c][i][o] += the products of a chunk, `positions` long.
template <class A>
void accumulate(const Geometry& g, const Panels& x_panels, const A* x, const Panels& grad_panels, const A* grad,
                int64_t positions, A* sums) {
    const int64_t runs = divide_up(positions, RUN), run = divide_up(positions, runs);
    const int64_t row = grad_panels.channels;
    // Few channels leave the product's rows empty. In one panel those of neighbouring positions follow each other, as
    // the taps of a row reach them.
    const bool taps_as_rows = x_panels.count == 1 && x_panels.width[0] < 4;
    const int64_t columns = taps_as_rows ? 1 : g.taps_w;
    for (int64_t j = 0; j < positions; j += run) {
        const int64_t depth = smaller(run, positions - j);
        for (int64_t o = 0; o < grad_panels.count; ++o) {
            const int64_t vectors = grad_panels.width[o] / LANES<A>;
            const A* right = grad_panels.at(grad, o, g.grad_positions()) + j * grad_panels.width[o];
            for (int64_t i = 0; i < x_panels.count; ++i) {
                const int64_t width = x_panels.width[i];
                const int64_t rows = taps_as_rows ? g.taps_w * width : width;
                const A* panel = x_panels.at(x, i, g.x_positions()) + j * width;
                A* block = sums + x_panels.start[i] * row + grad_panels.start[o];
                for (int64_t b = 0; b < g.taps_h; ++b)
                    for (int64_t c = 0; c < columns; ++c)
                        product<true>(rows, vectors, depth, {panel + (b * g.pitch() + c) * width, 1, width}, right,
                                      grad_panels.width[o],
                                      block + (b * g.taps_w + c) * x_panels.channels * row, row);
            }
        }
    }
}

// Element (o, i, a, 0, 0) of a weight-like tensor.
template <class T>
T* weight_row(const Tensor& weight, int64_t o, int64_t i, int64_t a) {
    int64_t offset = o * weight.strides[0] + i * weight.strides[1];
    if (weight.dimensions == 5) offset += a * weight.strides[2];
    return static_cast<T*>(weight.data) + offset;
}

// Adds `ranges` arrays of sums, `stride` apart, in their order, and writes the output channels of one vector.
template <class T, class A>
void write(const Geometry& g, const WeightBlock& b, const A* sums, int64_t row, int64_t ranges, int64_t stride,
           int64_t vector, const Tensor& grad_weight) {
    constexpr int64_t L = LANES<A>;
    const int64_t* strides = grad_weight.strides;
    const int last = grad_weight.dimensions - 1;
    const int64_t first = vector * L, count = smaller(L, b.outputs - first);
    for (int64_t i = 0; i < b.inputs; ++i) {
        T* to = weight_row<T>(grad_weight, b.output + first, b.input + i, b.tap);
        const A* from = sums + i * row + first;
        for (int64_t y = 0; y < g.taps_h; ++y)
            for (int64_t x = 0; x < g.taps_w; ++x, from += b.inputs * row) {
                Vec<A> total = load(from);
                for (int64_t r = 1; r < ranges; ++r) total += load(from + r * stride);
                T lanes[L];
                store(lanes, total);
                T* tap = to + y * strides[last - 1] + x * strides[last];
                for (int64_t lane = 0; lane < count; ++lane) tap[lane * strides[0]] = lanes[lane];
            }
    }
}

template <class T>
void backward_weight(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight) {
    using A = Arithmetic<T>;
    const Geometry g = make_geometry<A>(x, grad_weight);
    const Map<T> grad_map = as_map<T>(grad_out), x_map = as_map<T>(x);
    const int64_t per_piece = g.plane_taps() * g.input_block * g.output_block;
    const bool cut = g.ranges > 1;
    const Buffer<A> partial(cut ? g.ranges * g.blocks() * per_piece : 0);  // [range][block][b][c][i][o]

    parallel_for(g.ranges * g.blocks(), [&](int64_t piece) {
        const WeightBlock b = make_weight_block(piece % g.blocks(), g.outputs, g.output_block, g.inputs, g.input_block);
        const int64_t range = piece / g.blocks();
        const Panels x_panels = row_panels(b.inputs), grad_panels = vector_panels<A>(b.outputs);
        const int64_t x_elements = x_panels.elements<A>(g.x_positions());
        const int64_t grad_elements = grad_panels.elements<A>(g.grad_positions());
        Arena arena(x_elements * sizeof(A), grad_elements * sizeof(A), cut ? 0 : per_piece * sizeof(A));
        A* x_memory = arena.take<A>(x_elements);
        A* grad_memory = arena.take<A>(grad_elements);
        A* sums = cut ? partial.data + piece * per_piece : arena.take<A>(per_piece);
        fill_zero(sums, per_piece);

        const int64_t end = smaller((range + 1) * g.chunks_of_piece, g.chunks);
        for (int64_t i = range * g.chunks_of_piece; i < end; ++i) {
            const Chunk c = make_chunk(g, i);
            const int64_t z = c.plane % g.depth + b.tap - g.taps_d / 2;
            if (c.end == c.plane + 1 && (z < 0 || z >= g.depth)) continue;
            copy_x(g, x_map, b, c, x_panels, x_memory);
            copy_grad(g, grad_map, b, c, grad_panels, grad_memory);
            const int64_t positions = g.grad_rows(c.end - c.plane, c.y1 - c.y0) * g.pitch() - g.taps_w / 2;
            accumulate(g, x_panels, x_memory, grad_panels, grad_memory, positions, sums);
        }
        if (!cut)
            for (int64_t vector = 0; vector < divide_up(b.outputs, LANES<A>); ++vector)
                write<T>(g, b, sums, grad_panels.channels, 1, 0, vector, grad_weight);
    });

    if (!cut) return;
    const int64_t vectors = divide_up(g.output_block, LANES<A>);
    parallel_for(g.blocks() * vectors, [&](int64_t i) {
        const WeightBlock b = make_weight_block(i / vectors, g.outputs, g.output_block, g.inputs, g.input_block);
        if (i % vectors * LANES<A> < b.outputs)
            write<T>(g, b, partial.data + i / vectors * per_piece, vector_panels<A>(b.outputs).channels, g.ranges,
                     g.blocks() * per_piece, i % vectors, grad_weight);
    });
}

}  // namespace

void direct_conv_backward_weight(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight) {
    for_storage(x.dtype, [&](auto type) { backward_weight<decltype(type)>(grad_out, x, grad_weight); });
}

}  // namespace UTNETV2_ISA
}  // namespace utnetv2
