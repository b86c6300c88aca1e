// Maps (B, C, *spatial) of any strides as tiles whose innermost axis is contiguous, for kernels that treat every
// position alike and every channel with parameters of its own.
//
// With channels-last maps the rows of a tile are positions and its columns channels; with all others a tile is a run of
// positions of one channel. Whether the first holds is decided by one of a kernel's maps, the driver; a map laid out
// otherwise is copied into a tile, and out of one, element by element.
#pragma once

#include <cstdint>

#include "kernel_tools.hpp"
#include "tensor.hpp"
#include "vector.hpp"

namespace utnetv2 {
namespace {

template <class T>
struct ChannelMap {
    T* data;
    int64_t b, c;                  // strides
    int64_t sizes[3], strides[3];  // of the spatial axes, axes of one position in front
    bool uniform;                  // positions lie at multiples of one stride, `step`
    int64_t step;

    bool channels_first() const { return uniform && step == 1; }
    bool channels_last() const { return uniform && c == 1; }
};

template <class T>
ChannelMap<T> as_channel_map(const Tensor& t) {
    ChannelMap<T> map{static_cast<T*>(t.data), t.strides[0], t.strides[1], {1, 1, 1}, {0, 0, 0}, true, 1};
    const int axes = t.dimensions - 2;
    int64_t positions = 1;
    for (int i = 2; i >= 3 - axes; --i) {
        map.sizes[i] = t.sizes[t.dimensions - 3 + i], map.strides[i] = t.strides[t.dimensions - 3 + i];
        if (map.sizes[i] == 1) continue;
        if (positions == 1) map.step = map.strides[i];
        map.uniform = map.uniform && map.strides[i] == map.step * positions;
        positions *= map.sizes[i];
    }
    return map;
}

// How a map is cut, by its shape and layout alone.
struct ChannelGeometry {
    int64_t batch, channels, positions;
    bool channels_last;
    int64_t piece_channels, piece_positions;  // of a piece of work
    int64_t channel_pieces, position_pieces;

    int64_t pieces() const { return batch * channel_pieces * position_pieces; }
    // Numbered in the order of memory, so that threads at work together read what lies together.
    int64_t piece_of(int64_t sample, int64_t channel_piece, int64_t position_piece) const {
        return channels_last ? (sample * position_pieces + position_piece) * channel_pieces + channel_piece
                             : (sample * channel_pieces + channel_piece) * position_pieces + position_piece;
    }
};

// A piece of work: channels [c0, c0 + channels) at positions [p0, p0 + positions) of a sample.
struct ChannelPiece {
    int64_t sample, c0, channels, p0, positions;
};

template <class T>
ChannelGeometry make_channel_geometry(const Tensor& driver) {
    const ChannelMap<T> map = as_channel_map<T>(driver);
    ChannelGeometry g;
    g.batch = driver.sizes[0], g.channels = driver.sizes[1];
    g.positions = map.sizes[0] * map.sizes[1] * map.sizes[2];
    g.channels_last = g.channels > 1 && map.channels_last() && (map.step != 1 || g.positions == 1);
    // Enough pieces for many threads, each large enough to be worth handing out.
    const int64_t elements = clamp(g.batch * g.channels * g.positions / 64, 1 << 12, 1 << 16);
    if (g.channels_last) {
        g.piece_channels = smaller(g.channels, 512);
        g.piece_positions = clamp(elements / larger(g.piece_channels, 1), 1, larger(g.positions, 1));
    } else {
        g.piece_positions = clamp(g.positions, 1, elements);
        g.piece_channels = clamp(elements / g.piece_positions, 1, larger(g.channels, 1));
    }
    g.channel_pieces = divide_up(g.channels, g.piece_channels);
    g.position_pieces = divide_up(g.positions, g.piece_positions);
    return g;
}

inline ChannelPiece make_channel_piece(const ChannelGeometry& g, int64_t i) {
    const int64_t inner = g.channels_last ? g.channel_pieces : g.position_pieces;
    const int64_t outer = g.channels_last ? g.position_pieces : g.channel_pieces;
    const int64_t first = i % inner, second = i / inner % outer;
    ChannelPiece p;
    p.sample = i / inner / outer;
    p.c0 = (g.channels_last ? first : second) * g.piece_channels;
    p.p0 = (g.channels_last ? second : first) * g.piece_positions;
    p.channels = smaller(g.piece_channels, g.channels - p.c0);
    p.positions = smaller(g.piece_positions, g.positions - p.p0);
    return p;
}

// The part of a piece that is worked on while it lies in cache, and whose sums run in single precision: CHUNK_ROWS rows
// that fit the second cache, or a run that fits the first.
constexpr int64_t CHUNK_ELEMENTS = 16384;
constexpr int64_t CHUNK_ROWS = 256;
constexpr int64_t CHUNK_RUN = 4096;

struct ChannelChunk {
    int64_t sample, c0, channels, p0, positions;  // one channel unless channels-last
};

// Calls visit(chunk) for all chunks of a piece.
template <class F>
inline void for_chunks(const ChannelGeometry& g, const ChannelPiece& p, const F& visit) {
    const int64_t together = g.channels_last ? p.channels : 1;
    const int64_t most = g.channels_last ? clamp(CHUNK_ELEMENTS / p.channels, 1, CHUNK_ROWS) : CHUNK_RUN;
    for (int64_t c = 0; c < p.channels; c += together)
        for (int64_t i = 0; i < p.positions; i += most)
            visit(ChannelChunk{p.sample, p.c0 + c, together, p.p0 + i, smaller(most, p.positions - i)});
}

// Positions of rows, channels of columns where channels-last; else one row of positions. Columns are contiguous.
template <class T>
struct Tile {
    T* data;
    int64_t pitch;  // from row to row
};

// Calls visit(i, offset) for the positions [p0, p0 + count) of a map.
template <class T, class F>
inline void for_positions(const ChannelMap<T>& map, int64_t p0, int64_t count, const F& visit) {
    int64_t x = p0 % map.sizes[2], y = p0 / map.sizes[2] % map.sizes[1], z = p0 / (map.sizes[2] * map.sizes[1]);
    for (int64_t i = 0; i < count; ++i) {
        visit(i, z * map.strides[0] + y * map.strides[1] + x * map.strides[2]);
        if (++x == map.sizes[2]) {
            x = 0;
            if (++y == map.sizes[1]) y = 0, ++z;
        }
    }
}

// The tiles of one map: parts of the map itself where its layout allows, else copies in `memory`, of CHUNK_ELEMENTS.
// With large maps those that are written are copies too, streamed to the map.
template <class T>
class Tiles {
  public:
    Tiles(const ChannelGeometry& g, const ChannelMap<T>& map, T* memory)
        : map_(map),
          channels_last_(g.channels_last),
          in_place_(channels_last_ ? map.channels_last() : map.channels_first()),
          streamed_(in_place_ && g.batch * g.channels * g.positions * int64_t(sizeof(T)) >= STREAMED_BYTES),
          memory_(memory) {}

    // A tile to be written; written() must follow.
    Tile<T> at(const ChannelChunk& k) const {
        if (!in_place_ || streamed_) return {memory_, k.channels};
        return {of_map(k), map_.step};
    }
    void written(const ChannelChunk& k) const {
        if (!in_place_) copy(k, [](T& in_tile, T& in_map) { in_map = in_tile; });
        if (!streamed_) return;
        const bool one_run = !channels_last_ || map_.step == k.channels;
        const int64_t rows = one_run ? 1 : k.positions, columns = one_run ? k.positions * k.channels : k.channels;
        for (int64_t r = 0; r < rows; ++r)
            stream_run(of_map(k) + r * map_.step, memory_ + r * columns, columns);
        finish_streams();
    }
    // A tile with what the map holds.
    Tile<T> read(const ChannelChunk& k) const {
        if (in_place_) return {of_map(k), map_.step};
        copy(k, [](T& in_tile, T& in_map) { in_tile = in_map; });
        return {memory_, k.channels};
    }

  private:
    T* of_map(const ChannelChunk& k) const {
        return map_.data + k.sample * map_.b + k.c0 * map_.c + k.p0 * map_.step;
    }
    template <class F>
    void copy(const ChannelChunk& k, const F& move) const {
        for (int64_t c = 0; c < k.channels; ++c) {
            T* channel = map_.data + k.sample * map_.b + (k.c0 + c) * map_.c;
            for_positions(map_, k.p0, k.positions, [&](int64_t i, int64_t offset) {
                move(memory_[channels_last_ ? i * k.channels + c : i], channel[offset]);
            });
        }
    }

    const ChannelMap<T> map_;
    const bool channels_last_, in_place_, streamed_;
    T* const memory_;
};

// Element (b, c) of a tensor (B, C).
template <class A>
inline A& element(const Tensor& t, int64_t b, int64_t c) {
    return static_cast<A*>(t.data)[b * t.strides[0] + c * t.strides[1]];
}

// The values of a piece's channels, zeros behind them up to `width`.
template <class A>
inline void copy_parameters(const Tensor& from, const ChannelPiece& p, int64_t width, A* to) {
    for (int64_t c = 0; c < width; ++c) to[c] = c < p.channels ? element<A>(from, p.sample, p.c0 + c) : A(0);
}

// `from` or its first `count` elements, LANES of them unless PART.
template <bool PART, class T>
inline Vec<Arithmetic<T>> load_columns(const T* from, int64_t count) {
    return PART ? load_part(from, count) : load(from);
}
template <bool PART, class T>
inline void store_columns(T* to, Vec<Arithmetic<T>> value, int64_t count) {
    if (PART)
        store_part(to, value, count);
    else
        store(to, value);
}

}  // namespace
}  // namespace utnetv2
