// Dense convolution with 3 x 3 taps in planes, 2D and 3D, stride 1, zero 'same' padding, and its weight's gradient, by
// Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin and Gray 2016): what takes 36 products tap by tap takes 16.
//
// The output is cut into tiles of 2 x 2 positions, each of which 4 x 4 of the input reach. With
//
//         1  0 -1  0          1    0    0
//   B' =  0  1  1  0     G = 1/2  1/2  1/2     A' = 1  1  1  0
//         0 -1  1  0         1/2 -1/2  1/2          0  1 -1 -1
//         0  1  0 -1          0    0    1
//
//   V[tile, i] = B' in[i] B        U[i, o] = G weight[o, i] G'        M[tile, o] = sum over i of V[tile, i] * U[i, o]
//   out[tile, o] = A' M[tile, o] A
// and
//   grad_weight[o, i] = G' (sum over tiles of V[tile, i] * (A grad_out[tile, o] A')) G
//
// where * is elementwise: for each of the 16 points a product of matrices, positions by channels by channels. In 3D the
// sums run over the planes that the taps reach, too. `in`, given a scale and a shift of every sample and channel, is
// [ReLU](x * scale + shift), as in depthwise_conv.cpp. In float32 it rounds about as much as sums tap by tap do.
//
// The roof is the products' arithmetic. A piece of work is a block of tiles of one plane, whose V and M stay in the
// second cache between the three steps unless the channels are many; U is read from wherever it fits, once a piece, and
// meets BLOCK tiles there. The transforms read and write vectors of channels, so that maps must hold channels side by
// side; they take a fifth of the time. While the products run, the next piece's memory is fetched.
#include "kernel_tools.hpp"
#include "kernels.hpp"
#include "map.hpp"
#include "parallel.hpp"
#include "product.hpp"
#include "tile.hpp"
#include "vector.hpp"
#include "weight_block.hpp"

namespace utnetv2 {
namespace UTNETV2_ISA {
namespace {

constexpr int64_t SIDE = 4, POINTS = SIDE * SIDE;  // of a tile
constexpr int64_t BLOCK = 64;                      // tiles of a piece, at most
// Of the weight's gradient:
constexpr int64_t SUMS_BYTES = 384 << 10;  // of a block's sums, which share the second cache with a piece's points
constexpr int64_t OUTPUTS = 64;            // channels of a block, at most
constexpr int64_t PIECES = 32;             // at least, where the shape allows: enough for many threads

struct Geometry {
    int64_t batch, inputs, outputs;  // channels
    int64_t depth, height, width, taps_d;
    int64_t block_h, block_w;    // tiles of a piece
    int64_t blocks_h, blocks_w;  // pieces of a plane

    int64_t pieces() const { return batch * depth * blocks_h * blocks_w; }
    int64_t tiles() const { return block_h * block_w; }
};

Geometry make_geometry(const Tensor& x, const Tensor& weight) {
    Geometry g;
    const bool planar = x.dimensions == 4;
    const int last = x.dimensions - 1;
    g.batch = x.sizes[0], g.inputs = x.sizes[1], g.outputs = weight.sizes[0];
    g.depth = planar ? 1 : x.sizes[2], g.height = x.sizes[last - 1], g.width = x.sizes[last];
    g.taps_d = planar ? 1 : weight.sizes[2];
    const int64_t tiles_h = divide_up(g.height, 2), tiles_w = divide_up(g.width, 2);
    g.blocks_w = divide_up(tiles_w, BLOCK), g.block_w = divide_up(tiles_w, g.blocks_w);
    g.block_h = clamp(BLOCK / g.block_w, 1, tiles_h), g.blocks_h = divide_up(tiles_h, g.block_h);
    return g;
}

// Tiles [y0, y1) x [x0, x1) of a plane, and the planes [first, last) of taps that exist around it.
struct Piece {
    int64_t sample, z, y0, y1, x0, x1, first, last;

    int64_t tiles() const { return (y1 - y0) * (x1 - x0); }
};

Piece make_piece(const Geometry& g, int64_t i) {
    Piece p;
    p.x0 = i % g.blocks_w * g.block_w, i /= g.blocks_w;
    p.x1 = smaller(p.x0 + g.block_w, divide_up(g.width, 2));
    p.y0 = i % g.blocks_h * g.block_h, i /= g.blocks_h;
    p.y1 = smaller(p.y0 + g.block_h, divide_up(g.height, 2));
    p.z = i % g.depth, p.sample = i / g.depth;
    p.first = larger(g.taps_d / 2 - p.z, int64_t(0)), p.last = smaller(g.depth - p.z + g.taps_d / 2, g.taps_d);
    return p;
}

// Matrices of the 16 points, tiles by channels: element (tile, channel) of a point at tile * row + channel.
struct Points {
    int64_t row, point;  // from tile to tile, from point to point

    // The points lie an odd number of lines apart, so that they do not fall on the same sets of the cache.
    template <class A>
    static Points of(int64_t tiles, int64_t channels) {
        constexpr int64_t LINE = 64 / int64_t(sizeof(A));
        const int64_t row = round_up(channels, LANES<A>);
        return {row, round_up(tiles * row, 2 * LINE) + LINE};
    }
    int64_t elements() const { return POINTS * point; }
};

template <class A>
using Grid = Vec<A>[SIDE][SIDE];

// One row or column of a transform. B' d:
template <class A>
inline void transform_input(Vec<A>& a, Vec<A>& b, Vec<A>& c, Vec<A>& d) {
    const Vec<A> sum = b + c, difference = c - b;
    a = a - c, d = b - d, b = sum, c = difference;
}
// A g, of the two first:
template <class A>
inline void transform_gradient(Vec<A>& a, Vec<A>& b, Vec<A>& c, Vec<A>& d) {
    d = -b, c = a - b, b = a + b;
}
// A' m, to the two first:
template <class A>
inline void transform_output(Vec<A>& a, Vec<A>& b, Vec<A>& c, Vec<A>& d) {
    a = a + b + c, b = b - c - d;
}
// G w, of the three first:
template <class A>
inline void transform_weight(Vec<A>& a, Vec<A>& b, Vec<A>& c, Vec<A>& d) {
    const Vec<A> ends = (a + c) * A(0.5), middle = b * A(0.5);
    d = c, b = ends + middle, c = ends - middle;
}
// G' u, to the three first:
template <class A>
inline void transform_grad_weight(Vec<A>& a, Vec<A>& b, Vec<A>& c, Vec<A>& d) {
    const Vec<A> half = (b + c) * A(0.5);
    b = (b - c) * A(0.5), a = a + half, c = half + d;
}

// `transform` of `columns` columns, then of `rows` rows.
template <class A, class F>
inline void transform_grid(Grid<A>& grid, int columns, int rows, const F& transform) {
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) transform(grid[0][j], grid[1][j], grid[2][j], grid[3][j]);
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i) transform(grid[i][0], grid[i][1], grid[i][2], grid[i][3]);
}

// [ReLU](x * scale + shift) of a sample's vectors of channels, or x.
template <class A>
struct Prologue {
    const A *scale = nullptr, *shift = nullptr;  // from the first channel on
    bool relu = false;

    Vec<A> operator()(Vec<A> x, Vec<A> by, Vec<A> plus) const {
        if (!scale) return x;
        x = x * by + plus;
        return relu ? maximum<A>(x, Vec<A>{}) : x;
    }
};

// SIZE x SIZE positions from (y, x) of a plane on, for tiles of a piece and `channels` channels, transformed, to the
// points at `to`. A tile's positions outside the plane are zeros.
template <int SIZE, class T, class A, class F>
void transform_tiles(const Geometry& g, const Map<T>& map, const T* plane, const Piece& p, int64_t channels,
                     const Prologue<A>& prologue, A* to, const Points& points, const F& transform) {
    constexpr int64_t L = LANES<A>, AROUND = (SIZE - 2) / 2;
    for (int64_t ty = p.y0; ty < p.y1; ++ty)
        for (int64_t tx = p.x0; tx < p.x1; ++tx, to += points.row) {
            const int64_t y = 2 * ty - AROUND, x = 2 * tx - AROUND;
            const T* corner = plane + y * map.h + x * map.w;
            const bool inside = y >= 0 && y + SIZE <= g.height && x >= 0 && x + SIZE <= g.width;
            const auto run = [&](auto whole, int64_t c) {
                const Vec<A> scale = prologue.scale ? load(prologue.scale + c) : Vec<A>{};
                const Vec<A> shift = prologue.scale ? load(prologue.shift + c) : Vec<A>{};
                Grid<A> grid;
#pragma GCC unroll 4
                for (int i = 0; i < SIZE; ++i)
#pragma GCC unroll 4
                    for (int j = 0; j < SIZE; ++j) {
                        const T* from = corner + i * map.h + j * map.w + c;
                        if (decltype(whole)::value)
                            grid[i][j] = prologue(load(from), scale, shift);
                        else if (y + i < 0 || y + i >= g.height || x + j < 0 || x + j >= g.width)
                            grid[i][j] = Vec<A>{};
                        else
                            grid[i][j] = prologue(c + L <= channels ? load(from) : load_part(from, channels - c), scale,
                                                  shift);
                    }
                transform_grid<A>(grid, SIZE, SIDE, transform);
#pragma GCC unroll 4
                for (int i = 0; i < SIDE; ++i)
#pragma GCC unroll 4
                    for (int j = 0; j < SIDE; ++j) store(to + (i * SIDE + j) * points.point + c, grid[i][j]);
            };
            int64_t c = 0;
            for (; inside && c + L <= channels; c += L) run(Constant<true>{}, c);
            for (; c < channels; c += L) run(Constant<false>{}, c);
        }
}

// U of all points, planes of taps and channels: [point][panel of two vectors of outputs][plane][input][output].
template <class A>
struct TransformedWeight {
    static constexpr int64_t WIDTH = 2 * LANES<A>;
    const int64_t panels, depth;  // depth: planes times inputs
    const Buffer<A> memory;

    explicit TransformedWeight(const Geometry& g)
        : panels(divide_up(g.outputs, WIDTH)), depth(g.taps_d * g.inputs), memory(POINTS * panels * depth * WIDTH) {}
    A* at(int64_t point, int64_t panel) const { return memory.data + (point * panels + panel) * depth * WIDTH; }
};

// Rows of the weight lie apart, often at a power of two: a few inputs of each are copied together first.
template <class T, class A>
void transform_weight_panel(const Geometry& g, const Map<T>& weight, int64_t panel, const TransformedWeight<A>& u) {
    constexpr int64_t L = LANES<A>, WIDTH = TransformedWeight<A>::WIDTH, TAPS = 9, TOGETHER = 16;
    const int64_t outputs = smaller(WIDTH, g.outputs - panel * WIDTH);
    A together[TOGETHER * TAPS][WIDTH] = {};  // [input, tap][output]
    for (int64_t first = 0; first < u.depth; first += TOGETHER) {
        const int64_t count = smaller(TOGETHER, u.depth - first);
        for (int64_t o = 0; o < outputs; ++o)
            for (int64_t k = 0; k < count; ++k) {
                const T* taps = &weight(panel * WIDTH + o, (first + k) % g.inputs, (first + k) / g.inputs, 0, 0);
                for (int64_t t = 0; t < TAPS; ++t)
                    together[k * TAPS + t][o] = to_arithmetic(taps[t / 3 * weight.h + t % 3 * weight.w]);
            }
        for (int64_t k = 0; k < count; ++k)
            for (int64_t lane = 0; lane < WIDTH; lane += L) {
                Grid<A> grid;
                for (int64_t t = 0; t < TAPS; ++t) grid[t / 3][t % 3] = load(together[k * TAPS + t] + lane);
                transform_grid<A>(grid, 3, SIDE, transform_weight<A>);
                for (int64_t point = 0; point < POINTS; ++point)
                    store(u.at(point, panel) + (first + k) * WIDTH + lane, grid[point / SIDE][point % SIDE]);
            }
    }
}

// Whether `out` is streamed: it is large, and its vectors of channels lie where whole ones can be.
template <class T, class A>
bool is_streamed(const Geometry& g, const Map<T>& out) {
    const int64_t bytes = g.batch * g.outputs * g.depth * g.height * g.width * int64_t(sizeof(T));
    const bool aligned = uintptr_t(out.data) % UTNETV2_VECTOR_BYTES == 0 && g.outputs % LANES<A> == 0 &&
                         (out.b | out.d | out.h | out.w) % LANES<A> == 0;
    return sizeof(T) == sizeof(A) && aligned && bytes >= STREAMED_BYTES;
}

// The tiles of a piece from their points to `out`, as far as they lie in the plane.
template <bool STREAMED, class T, class A>
void write_tiles(const Geometry& g, const Map<T>& out, const Piece& p, const A* m, const Points& points) {
    constexpr int64_t L = LANES<A>;
    T* plane = out.data + p.sample * out.b + p.z * out.d;
    for (int64_t ty = p.y0; ty < p.y1; ++ty)
        for (int64_t tx = p.x0; tx < p.x1; ++tx, m += points.row) {
            T* corner = plane + 2 * ty * out.h + 2 * tx * out.w;
            const int64_t rows = smaller(g.height - 2 * ty, 2), columns = smaller(g.width - 2 * tx, 2);
            for (int64_t c = 0; c < g.outputs; c += L) {
                Grid<A> grid;
#pragma GCC unroll 4
                for (int i = 0; i < SIDE; ++i)
#pragma GCC unroll 4
                    for (int j = 0; j < SIDE; ++j) grid[i][j] = load(m + (i * SIDE + j) * points.point + c);
                transform_grid<A>(grid, SIDE, 2, transform_output<A>);
#pragma GCC unroll 2
                for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
                    for (int j = 0; j < 2; ++j) {
                        if (i >= rows || j >= columns) continue;
                        T* to = corner + i * out.h + j * out.w + c;
                        if (STREAMED)
                            stream(to, &grid[i][j]);
                        else if (c + L <= g.outputs)
                            store(to, grid[i][j]);
                        else
                            store_part(to, grid[i][j], g.outputs - c);
                    }
            }
        }
    if (STREAMED) finish_streams();
}

// The scale and shift of every sample and channel, zeros behind them up to whole vectors.
template <class A>
class Prologues {
  public:
    Prologues(const Geometry& g, const Tensor* scale, const Tensor* shift, bool relu)
        : pitch_(round_up(g.inputs, LANES<A>)), relu_(relu), given_(scale), memory_(given_ ? 2 * g.batch * pitch_ : 0) {
        for (int64_t i = 0; given_ && i < g.batch * pitch_; ++i) {
            const int64_t b = i / pitch_, c = i % pitch_;
            memory_.data[i] = c < g.inputs ? of(*scale, b, c) : A(0);
            memory_.data[g.batch * pitch_ + i] = c < g.inputs ? of(*shift, b, c) : A(0);
        }
        shift_ = memory_.data + g.batch * pitch_;
    }
    // From `channel` on, a multiple of LANES.
    Prologue<A> at(int64_t sample, int64_t channel) const {
        if (!given_) return {};
        const int64_t offset = sample * pitch_ + channel;
        return {memory_.data + offset, shift_ + offset, relu_};
    }

  private:
    static A of(const Tensor& t, int64_t b, int64_t c) {
        return static_cast<const A*>(t.data)[b * t.strides[0] + c * t.strides[1]];
    }
    const int64_t pitch_;
    const bool relu_, given_;
    const Buffer<A> memory_;
    const A* shift_;
};

// Fetches the rows of plane z of a map that a piece's tiles reach; nothing where positions lie far apart.
template <class T>
Fetch<T> fetch_piece(const Map<T>& map, const Piece& p, int64_t z, int64_t around, int64_t channels, int64_t steps) {
    const bool dense = map.w <= 2 * channels;
    const int64_t rows = dense ? 2 * (p.y1 - p.y0 + around) : 0, columns = 2 * (p.x1 - p.x0 + around);
    const T* plane = map.data + p.sample * map.b + z * map.d;
    const T* from = plane + (2 * p.y0 - around) * map.h + (2 * p.x0 - around) * map.w;
    return {from, map.h, 1, rows, (columns - 1) * map.w + channels, steps};
}

template <class T>
void convolve(const Tensor& x, const Tensor& weight, const Tensor* scale, const Tensor* shift, bool relu,
              const Tensor& out) {
    using A = Arithmetic<T>;
    const Geometry g = make_geometry(x, weight);
    const Map<T> from = as_map<T>(x), to = as_map<T>(out), w = as_map<T>(weight);
    const Prologues<A> prologues(g, scale, shift, relu);
    const TransformedWeight<A> u(g);
    parallel_for(u.panels, [&](int64_t panel) { transform_weight_panel(g, w, panel, u); });

    // The last vector of a plane's channels reaches beyond them.
    const Points v_points = Points::of<A>(g.tiles(), (g.taps_d - 1) * g.inputs + round_up(g.inputs, LANES<A>));
    const Points m_points = Points::of<A>(g.tiles(), u.panels * u.WIDTH);
    const bool streamed = is_streamed<T, A>(g, to);
    parallel_for(g.pieces(), [&](int64_t i) {
        const Piece p = make_piece(g, i);
        Arena arena(v_points.elements() * sizeof(A), m_points.elements() * sizeof(A));
        A* v = arena.take<A>(v_points.elements());
        A* m = arena.take<A>(m_points.elements());
        for (int64_t a = p.first; a < p.last; ++a) {
            const T* plane = from.data + p.sample * from.b + (p.z + a - g.taps_d / 2) * from.d;
            transform_tiles<SIDE>(g, from, plane, p, g.inputs, prologues.at(p.sample, 0),
                                  v + (a - p.first) * g.inputs, v_points, transform_input<A>);
        }
        const int64_t steps = POINTS * u.panels * product_steps(p.tiles(), 2);
        const Piece next = make_piece(g, smaller(i + 1, g.pieces() - 1));
        // Of the planes around it the last one is the one that no piece has met.
        const int64_t next_z = next.z + next.last - 1 - g.taps_d / 2;
        Fetch<T> fetch_in = fetch_piece(from, next, next_z, 1, g.inputs, steps);
        Fetch<T> fetch_out = fetch_piece(to, p, p.z, 0, g.outputs, steps);
        const auto meanwhile = [&] {
            fetch_in();
            if (!streamed) fetch_out();
        };
        for (int64_t point = 0; point < POINTS; ++point)
            for (int64_t panel = 0; panel < u.panels; ++panel)
                product<false>(p.tiles(), 2, (p.last - p.first) * g.inputs,
                               Strided<A>{v + point * v_points.point, v_points.row, 1},
                               u.at(point, panel) + p.first * g.inputs * u.WIDTH, u.WIDTH,
                               m + point * m_points.point + panel * u.WIDTH, m_points.row, meanwhile);
        streamed ? write_tiles<true>(g, to, p, m, m_points) : write_tiles<false>(g, to, p, m, m_points);
    });
}

// The weight's gradient is cut into blocks: a plane of taps, some inputs, some outputs. A piece of work is a block and
// a range of the pieces that the forward pass has.
struct Blocks {
    int64_t inputs, outputs;       // channels of a block
    int64_t count, ranges, range;  // blocks, ranges, pieces of a range

    int64_t sums() const { return POINTS * inputs * outputs; }
};

template <class A>
Blocks make_blocks(const Geometry& g) {
    constexpr int64_t L = LANES<A>;
    Blocks b;
    b.outputs = smaller(round_up(g.outputs, 2 * L), OUTPUTS);
    const int64_t inputs = larger(SUMS_BYTES / int64_t(sizeof(A)) / (POINTS * b.outputs), L);
    b.inputs = round_up(divide_up(g.inputs, divide_up(g.inputs, inputs)), L);
    b.count = g.taps_d * divide_up(g.inputs, b.inputs) * divide_up(g.outputs, b.outputs);
    b.range = divide_up(larger(g.pieces(), int64_t(1)), divide_up(PIECES, b.count));
    b.ranges = larger(divide_up(g.pieces(), b.range), int64_t(1));
    return b;
}

// Adds the sums of all ranges, `stride` apart, for the block's input `i` and a vector of outputs, and writes its taps.
template <class T, class A>
void write_taps(const Blocks& b, const WeightBlock& block, const A* sums, int64_t stride, int64_t i, int64_t lane,
                const Map<T>& grad_weight) {
    constexpr int64_t L = LANES<A>;
    Grid<A> grid;
    for (int64_t point = 0; point < POINTS; ++point) {
        const A* from = sums + (point * b.inputs + i) * b.outputs + lane;
        Vec<A> total = load(from);
        for (int64_t r = 1; r < b.ranges; ++r) total += load(from + r * stride);
        grid[point / SIDE][point % SIDE] = total;
    }
    transform_grid<A>(grid, SIDE, 3, transform_grad_weight<A>);
    for (int64_t y = 0; y < 3; ++y)
        for (int64_t x = 0; x < 3; ++x) {
            T outputs[L];
            store(outputs, grid[y][x]);
            for (int64_t n = 0; n < smaller(L, block.outputs - lane); ++n)
                grad_weight(block.output + lane + n, block.input + i, block.tap, y, x) = outputs[n];
        }
}

template <class T>
void backward_weight(const Tensor& grad_out, const Tensor& x, const Tensor* scale, const Tensor* shift, bool relu,
                     const Tensor& grad_weight) {
    using A = Arithmetic<T>;
    constexpr int64_t L = LANES<A>;
    const Geometry g = make_geometry(x, grad_weight);
    const Blocks b = make_blocks<A>(g);
    const Map<T> grad = as_map<T>(grad_out), from = as_map<T>(x);
    const Prologues<A> prologues(g, scale, shift, relu);
    const Buffer<A> sums(b.ranges * b.count * b.sums());  // [range][block][point][input][output]
    const Points v_points = Points::of<A>(g.tiles(), b.inputs), grad_points = Points::of<A>(g.tiles(), b.outputs);

    parallel_for(b.ranges * b.count, [&](int64_t piece) {
        const WeightBlock block = make_weight_block(piece % b.count, g.outputs, b.outputs, g.inputs, b.inputs);
        const int64_t begin = piece / b.count * b.range, end = smaller(begin + b.range, g.pieces());
        const int64_t shift_d = block.tap - g.taps_d / 2, vectors = divide_up(block.outputs, L);
        Arena arena(v_points.elements() * sizeof(A), grad_points.elements() * sizeof(A));
        A* v = arena.take<A>(v_points.elements());
        A* transformed_grad = arena.take<A>(grad_points.elements());
        A* total = sums.data + piece * b.sums();
        fill_zero(total, b.sums());
        for (int64_t i = begin; i < end; ++i) {
            const Piece p = make_piece(g, i);
            if (block.tap < p.first || block.tap >= p.last) continue;
            const T* plane = from.data + p.sample * from.b + (p.z + shift_d) * from.d + block.input * from.c;
            transform_tiles<SIDE>(g, from, plane, p, block.inputs, prologues.at(p.sample, block.input), v, v_points,
                                  transform_input<A>);
            const T* grad_plane = grad.data + p.sample * grad.b + p.z * grad.d + block.output * grad.c;
            transform_tiles<2>(g, grad, grad_plane, p, block.outputs, {}, transformed_grad, grad_points,
                               transform_gradient<A>);
            for (int64_t point = 0; point < POINTS; ++point)
                product<true>(block.inputs, vectors, p.tiles(), Strided<A>{v + point * v_points.point, 1, v_points.row},
                              transformed_grad + point * grad_points.point, grad_points.row,
                              total + point * b.inputs * b.outputs, b.outputs);
        }
    });

    parallel_for(b.count * b.inputs, [&](int64_t row) {
        const WeightBlock block = make_weight_block(row / b.inputs, g.outputs, b.outputs, g.inputs, b.inputs);
        if (row % b.inputs >= block.inputs) return;
        for (int64_t lane = 0; lane < block.outputs; lane += L)
            write_taps<T>(b, block, sums.data + row / b.inputs * b.sums(), b.count * b.sums(), row % b.inputs, lane,
                          as_map<T>(grad_weight));
    });
}

}  // namespace

void winograd_conv(const Tensor& x, const Tensor& weight, const Tensor* scale, const Tensor* shift, bool relu,
                   const Tensor& out) {
    for_storage(x.dtype, [&](auto type) { convolve<decltype(type)>(x, weight, scale, shift, relu, out); });
}

void winograd_conv_backward_weight(const Tensor& grad_out, const Tensor& x, const Tensor* scale, const Tensor* shift,
                                   bool relu, const Tensor& grad_weight) {
    for_storage(x.dtype,
                [&](auto type) { backward_weight<decltype(type)>(grad_out, x, scale, shift, relu, grad_weight); });
}

}  // namespace UTNETV2_ISA
}  // namespace utnetv2
