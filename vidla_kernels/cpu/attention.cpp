// Both attentions on a CPU in fp32, forward and backward; compiled once for each instruction set (simd.h).
//
// A thread takes one unit at a time: all heads of one place of a clip (tube attention: the T rows of a head are a frame of
// its own), or one head of a clip, frame after frame (hierarchical). The q, k, v and dO of a frame are copied once to where
// rows are neighbours, into the thread's memory, which stays in its second-level cache; each row of the results is stored once.
//
// Scores lie transposed, S^T = K (s q)^T: a row for each key, a lane for each query, 4 vectors of queries (a block) at a time.
// So the softmax and its gradient run down the lanes without one sum across a vector, P is in every later product the operand
// whose elements are broadcast, whichever way it is read, and only q and dO are ever transposed, a block at a time.
//
// The summary rows that see a frame are further lanes of its last block: their keys are the frame's, and the patches' keys
// those and the summary tokens', which lie before them. What summary rows see of each other is a block of its own. A summary
// row's shares are merged frame by frame in their order, so nothing depends on the number of threads.
#include "call.h"
#include "simd.h"

namespace vidla {
namespace VIDLA_VERSION {
namespace {

constexpr int BLOCK = 4 * W;
constexpr float LOG2E = 1.44269504f;
constexpr float INF = __builtin_inff();

int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Rows of D floats that lie `row` floats apart, somewhere in a caller's tensor.
struct Rows {
  float* at;
  int64_t row;
};

// A thread's memory, and the sizes of one call.
struct Work {
  const Call& call;
  int T, N, G, H, D, width;  // width: D in whole vectors
  bool tube, backward;
  float *q, *d_out, *k, *v, *dk, *dv;         // of a frame: patches, then summary rows; summary keys, then patches
  float *summary_q, *summary_d;                // of the summary rows
  float *summary_o, *summary_dk, *summary_dv;  // sums over frames: P V or dq of the summary rows, shares of their keys
  float *qt, *dt, *s, *ds, *o;                 // of a block: (s q)^T, dO^T, S^T or P^T, dP^T or dS^T, and P V or dq
  float *top, *total, *delta;                  // of its lanes
  float *summary_top, *summary_total, *summary_delta, *active;  // of the summary rows; the numbers of those that see a frame
  float* lse;                                  // of all lanes of a frame
  int64_t size;

  Work(const Call& c, float* memory) : call(c), T(c.frames), N(c.patches), G(c.summary), H(c.heads), D(c.head_dim) {
    tube = c.which == TUBE_FORWARD || c.which == TUBE_BACKWARD, backward = c.which == TUBE_BACKWARD || c.which == HIERARCHICAL_BACKWARD;
    if (tube) N = T, G = 0;
    width = up(D, W);
    float* at = memory;
    auto take = [&](int64_t rows, int64_t columns, auto&... buffers) {
      ((buffers = at, at += up(rows * columns, 16)), ...);
    };
    int64_t rows = up(N + G, 4) + 4;  // a transpose reads whole fours
    take(rows, width, q, d_out, k, v, dk, dv);
    take(G, width, summary_q, summary_d, summary_o, summary_dk, summary_dv);
    take(up(D, 4), BLOCK, qt, dt);
    take(N + G, BLOCK, s, ds);
    take(BLOCK, width, o);
    take(BLOCK, 1, top, total, delta);
    take(G + BLOCK, 1, summary_top, summary_total, summary_delta, active);
    take(up(N + G, BLOCK), 1, lse);
    size = at - memory;
  }

  // Where the rows of the patches of a frame begin. In tube attention "frame" is a place, whose rows lie N tokens apart.
  Rows qkv(int64_t b, int64_t token, int64_t h, int third) const {
    return {const_cast<float*>(call.qkv) + b * call.qkv_batch + token * call.qkv_token + third * call.qkv_third + h * call.qkv_head,
            call.qkv_token * step()};
  }
  Rows grad(int64_t b, int64_t token, int64_t h) const {
    return {const_cast<float*>(call.d_out) + b * call.d_out_batch + token * call.d_out_token + h * call.d_out_head,
            call.d_out_token * step()};
  }
  int64_t tokens() const { return call.summary + int64_t(T) * call.patches; }
  int64_t step() const { return tube ? call.patches : 1; }
  Rows out(int64_t b, int64_t token, int64_t h) const { return {call.out + ((b * tokens() + token) * H + h) * D, step() * H * D}; }
  Rows d_qkv(int64_t b, int64_t token, int64_t h, int third) const {
    return {call.d_qkv + (((b * tokens() + token) * 3 + third) * H + h) * D, step() * 3 * H * D};
  }

  void read(Rows from, int rows, float* to) const {
    for (int i = 0; i < rows; ++i, to += width) copy(from.at + i * from.row, to, 1.f);
  }
  // Asks for rows that are read soon; a row of a frame lies in a page of its own, which no processor guesses.
  void fetch(Rows from, int rows) const {
    for (int i = 0; i < rows; ++i)
      for (int d = 0; d < D; d += 16) __builtin_prefetch(from.at + i * from.row + d, 0, 2);
  }
  void write(const float* from, int rows, Rows to, const float* factor = nullptr) const {
    for (int i = 0; i < rows; ++i, from += width) copy(from, to.at + i * to.row, factor ? factor[i] : 1.f);
  }
  void move(const float* from, int rows, float* to) const { __builtin_memcpy(to, from, sizeof(float) * rows * width); }
  void add(const float* from, int rows, float* to) const {
    for (int64_t i = 0; i < int64_t(rows) * width; i += W) store(to + i, load(to + i) + load(from + i));
  }
  void copy(const float* from, float* to, float factor) const {
    int d = 0;
    for (; d + W <= D; d += W) store(to + d, load(from + d) * factor);
    for (; d < D; ++d) to[d] = from[d] * factor;
  }
};

// Lanes of a block: the first `patches` see the keys from..end, the others (summary rows) the keys own..end. Keys are rows of
// w.k and w.v, lanes rows of w.q and w.d_out from `first` on.
struct Block {
  int first, lanes, patches, from, own, end;
  bool among_summary = false;  // whose visibility call.rows tells
  int keys() const { return end - from; }
  int vectors() const { return (lanes + W - 1) / W; }
};

// to (keys, lanes) = rows (keys, D) * columns (D, lanes), in sums of 32 products: one long sum would round more, and in scores
// of some hundreds a softmax makes it large.
void dots(const Work& w, const Block& at, const float* rows, const float* columns, float* to) {
  const int row = at.vectors() * W;
  for (int d = 0; d < w.D; d += 32)
    product(at.keys(), at.vectors(), w.D - d < 32 ? w.D - d : 32, rows + int64_t(at.from) * w.width + d, w.width, 1,
            columns + d * row, row, to, row, d > 0);
}

void scores(Work& w, const Block& at) {
  int row = at.vectors() * W;
  transpose(w.q + int64_t(at.first) * w.width, w.width, at.lanes, w.D, w.call.scale * LOG2E, w.qt, row);
  dots(w, at, w.k, w.qt, w.s);
  for (int k = at.from; k < at.own; ++k)  // keys of the patches alone
    for (int i = at.patches; i < at.lanes; ++i) w.s[(k - at.from) * row + i] = -INF;
  if (at.among_summary)
    for (int k = at.from; k < at.end; ++k)
      for (int i = 0; i < at.lanes; ++i) {
        const int32_t* sees = w.call.rows + 3 * (at.first + i);
        if (k < sees[0] || k >= sees[1]) w.s[(k - at.from) * row + i] = -INF;
      }
}

// P^T = 2^(S^T - top) with the sums of its lanes, top their largest scores.
template <int C>
void softmax(float* s, int keys, float* top, float* total) {
  Vec most[C], sum[C] = {};
  for (int c = 0; c < C; ++c) most[c] = load(s + c * W);
  for (int k = 1; k < keys; ++k)
    for (int c = 0; c < C; ++c) most[c] = largest(most[c], load(s + (k * C + c) * W));
  for (int k = 0; k < keys; ++k)
    for (int c = 0; c < C; ++c) {
      Vec p = exp2(load(s + (k * C + c) * W) - most[c]);
      sum[c] += p;
      store(s + (k * C + c) * W, p);
    }
  for (int c = 0; c < C; ++c) store(top + c * W, most[c]), store(total + c * W, sum[c]);
}

// dS^T = scale P^T (dP^T - delta), where delta is the mean of dP down a lane by the weights P, whose sum is not quite 1: a large
// lse is rounded. That of a summary row, whose lane is not the whole row, is known: only the first `patches` are computed.
// s: P^T times total where `lse` is null, else S^T, of which it makes P^T.
template <int C>
void softmax_backward(float* s, float* ds, int keys, const float* lse, const float* total, float* delta, int patches, float scale) {
  Vec sum[C] = {}, weight[C] = {}, per[C], low[C] = {};
  for (int c = 0; c < C; ++c)
    if (lse) low[c] = load(lse + c * W), per[c] = splat(1.f);
    else per[c] = 1.f / load(total + c * W);
  for (int k = 0; k < keys; ++k)
    for (int c = 0; c < C; ++c) {
      float* at = s + (k * C + c) * W;
      Vec p = lse ? exp2(load(at) - low[c]) : load(at) * per[c];
      sum[c] += p * load(ds + (k * C + c) * W);
      weight[c] += p;
      store(at, p);
    }
  for (int c = 0; c < C; ++c) {
    sum[c] /= weight[c];
    for (int i = 0; i < W; ++i)
      if (c * W + i < patches) delta[c * W + i] = sum[c][i];
    sum[c] = load(delta + c * W);
  }
  for (int k = 0; k < keys; ++k)
    for (int c = 0; c < C; ++c) {
      int64_t at = (k * C + c) * W;
      store(ds + at, load(s + at) * (load(ds + at) - sum[c]) * scale);
    }
}

void softmax(float* s, int keys, int vectors, float* top, float* total) {
  static constexpr decltype(&softmax<1>) of[] = {softmax<1>, softmax<2>, softmax<3>, softmax<4>};
  of[vectors - 1](s, keys, top, total);
}

void softmax_backward(float* s, float* ds, int keys, int vectors, const float* lse, const float* total, float* delta, int patches,
                      float scale) {
  static constexpr decltype(&softmax_backward<1>) of[] = {softmax_backward<1>, softmax_backward<2>, softmax_backward<3>,
                                                          softmax_backward<4>};
  of[vectors - 1](s, ds, keys, lse, total, delta, patches, scale);
}

// What a block attends to, w.o = P V unnormalised, with top and total of its lanes.
void attend(Work& w, const Block& at) {
  scores(w, at);
  int row = at.vectors() * W, wide = w.width / W;
  softmax(w.s, at.keys(), at.vectors(), w.top, w.total);
  const float *own = w.s + int64_t(at.own - at.from) * row + at.patches, *v = w.v;
  product(at.patches, wide, at.keys(), w.s, 1, row, v + int64_t(at.from) * w.width, w.width, w.o, w.width);
  product(at.lanes - at.patches, wide, at.end - at.own, own, 1, row, v + int64_t(at.own) * w.width, w.width,
          w.o + int64_t(at.patches) * w.width, w.width);
}

// The gradients of a block: its dq in w.o, its shares of dk and dv added to w.dk and w.dv or, where `fresh`, put in their place.
// lse of its lanes is null where nothing was kept from the forward.
void attend_backward(Work& w, const Block& at, const float* lse, bool fresh) {
  scores(w, at);
  int row = at.vectors() * W, wide = w.width / W;
  transpose(w.d_out + int64_t(at.first) * w.width, w.width, at.lanes, w.D, 1.f, w.dt, row);
  dots(w, at, w.v, w.dt, w.ds);
  if (!lse) softmax(w.s, at.keys(), at.vectors(), w.top, w.total);
  softmax_backward(w.s, w.ds, at.keys(), at.vectors(), lse, w.total, w.delta, at.among_summary ? 0 : at.patches, w.call.scale);
  int64_t width = w.width, from = at.from * width, own = at.own * width, corner = int64_t(at.own - at.from) * row;
  const float *q = w.q + at.first * width, *d_out = w.d_out + at.first * width;
  int shared = at.own - at.from, others = at.end - at.own;
  product(shared, wide, at.patches, w.s, row, 1, d_out, width, w.dv + from, width, !fresh);
  product(others, wide, at.lanes, w.s + corner, row, 1, d_out, width, w.dv + own, width, !fresh);
  product(shared, wide, at.patches, w.ds, row, 1, q, width, w.dk + from, width, !fresh);
  product(others, wide, at.lanes, w.ds + corner, row, 1, q, width, w.dk + own, width, !fresh);
  product(at.patches, wide, at.keys(), w.ds, 1, row, w.k + from, width, w.o, width);
  product(at.lanes - at.patches, wide, others, w.ds + corner + at.patches, 1, row, w.k + own, width, w.o + at.patches * width, width);
}

void tube(Work& w, int64_t unit) {
  int64_t b = unit / w.call.patches, place = unit % w.call.patches;
  for (int h = 0; h < w.H; ++h) {
    w.read(w.qkv(b, place, h, 0), w.T, w.q);
    w.read(w.qkv(b, place, h, 1), w.T, w.k);
    w.read(w.qkv(b, place, h, 2), w.T, w.v);
    if (w.backward) w.read(w.grad(b, place, h), w.T, w.d_out);
    if (h + 1 < w.H) {
      for (int third = 0; third < 3; ++third) w.fetch(w.qkv(b, place, h + 1, third), w.T);
      if (w.backward) w.fetch(w.grad(b, place, h + 1), w.T);
      if (!w.backward) w.fetch(w.out(b, place, h + 1), w.T);
      else for (int third = 0; third < 3; ++third) w.fetch(w.d_qkv(b, place, h + 1, third), w.T);
    }
    for (int i = 0; i < w.T; i += BLOCK) {
      int rows = w.T - i < BLOCK ? w.T - i : BLOCK;
      Block at{i, rows, rows, 0, 0, w.T};
      if (!w.backward) {
        attend(w, at);
        for (int j = 0; j < at.vectors() * W; j += W) store(w.total + j, 1.f / load(w.total + j));
        w.write(w.o, at.lanes, w.out(b, place + int64_t(i) * w.call.patches, h), w.total);
      } else {
        attend_backward(w, at, nullptr, i == 0);
        w.write(w.o, at.lanes, w.d_qkv(b, place + int64_t(i) * w.call.patches, h, 0));
      }
    }
    if (w.backward) {
      w.write(w.dk, w.T, w.d_qkv(b, place, h, 1));
      w.write(w.dv, w.T, w.d_qkv(b, place, h, 2));
    }
  }
}

// The summary rows that see a frame.
int seeing(const Work& w, int frame, int* rows) {
  int count = 0;
  for (int g = 0; g < w.G; ++g)
    if (frame % w.call.rows[3 * g + 2] == 0) rows[count++] = g;
  return count;
}

// Calls on(block) for all lanes of frame t: its patches, then the `also` summary rows that see it.
template <class F>
void blocks(Work& w, int also, F on) {
  for (int i = 0, rows = w.N + also; i < rows; i += BLOCK) {
    int lanes = rows - i < BLOCK ? rows - i : BLOCK, patches = w.N - i < 0 ? 0 : w.N - i < lanes ? w.N - i : lanes;
    on(Block{i, lanes, patches, w.call.first_key, w.G, w.G + w.N});
  }
}

// Calls on(block) for what the summary rows see of each other.
template <class F>
void blocks_of_summary(Work& w, F on) {
  for (int i = 0; i < w.G; i += BLOCK) {
    int lanes = w.G - i < BLOCK ? w.G - i : BLOCK;
    on(Block{i, lanes, lanes, 0, w.G, w.G, true});
  }
}

// The lane that is summary row `row` joins what that row has seen so far: (top, total, P V), each relative to its own top.
void merge(Work& w, int lane, int row) {
  float top = w.summary_top[row], more = w.top[lane], *o = w.summary_o + int64_t(row) * w.width;
  float most = more > top ? more : top;
  Vec parts = {top - most, more - most};
  parts = exp2(parts);
  w.summary_top[row] = most;
  w.summary_total[row] = w.summary_total[row] * parts[0] + w.total[lane] * parts[1];
  for (int d = 0; d < w.width; d += W)
    store(o + d, load(o + d) * parts[0] + load(w.o + int64_t(lane) * w.width + d) * parts[1]);
}

// From top and total of `lanes` rows, to the log-sum-exp and to the factor that divides by total, in the place of total.
void finish(const float* top, float* total, int lanes, float* lse) {
  for (int i = 0; i < lanes; i += W) {
    Vec sum = load(total + i), log = load(top + i) + log2(sum);
    store(total + i, 1.f / sum);
    for (int j = 0; j < W && i + j < lanes; ++j) lse[i + j] = log[j];
  }
}

void hierarchical_forward(Work& w, int64_t b, int64_t h, int* active) {
  const int64_t width = w.width;
  float* lse = w.call.lse + (b * w.H + h) * w.tokens();
  w.read(w.qkv(b, 0, h, 0), w.G, w.summary_q);
  w.read(w.qkv(b, 0, h, 1), w.G, w.k);
  w.read(w.qkv(b, 0, h, 2), w.G, w.v);
  w.move(w.summary_q, w.G, w.q);
  blocks_of_summary(w, [&](const Block& at) {
    attend(w, at);
    w.move(w.o, at.lanes, w.summary_o + at.first * width);
    __builtin_memcpy(w.summary_top + at.first, w.top, at.lanes * sizeof(float));
    __builtin_memcpy(w.summary_total + at.first, w.total, at.lanes * sizeof(float));
  });
  for (int t = 0; t < w.T; ++t) {
    const int64_t token = w.G + int64_t(t) * w.N;
    const int also = seeing(w, t, active);
    w.read(w.qkv(b, token, h, 0), w.N, w.q);
    w.read(w.qkv(b, token, h, 1), w.N, w.k + w.G * width);
    w.read(w.qkv(b, token, h, 2), w.N, w.v + w.G * width);
    for (int i = 0; i < also; ++i) w.move(w.summary_q + active[i] * width, 1, w.q + (w.N + i) * width);
    blocks(w, also, [&](const Block& at) {
      attend(w, at);
      for (int i = at.patches; i < at.lanes; ++i) merge(w, i, active[at.first + i - w.N]);
      finish(w.top, w.total, at.patches, lse + token + at.first);
      w.write(w.o, at.patches, w.out(b, token + at.first, h), w.total);
    });
  }
  finish(w.summary_top, w.summary_total, w.G, lse);
  w.write(w.summary_o, w.G, w.out(b, 0, h), w.summary_total);
}

void hierarchical_backward(Work& w, int64_t b, int64_t h, int* active) {
  const int64_t width = w.width;
  const float* lse = w.call.lse + (b * w.H + h) * w.tokens();
  w.read(w.qkv(b, 0, h, 0), w.G, w.summary_q);
  w.read(w.qkv(b, 0, h, 1), w.G, w.k);
  w.read(w.qkv(b, 0, h, 2), w.G, w.v);
  w.read(w.grad(b, 0, h), w.G, w.summary_d);
  for (int g = 0; g < w.G; ++g) {
    w.read(w.out(b, g, h), 1, w.o);
    float sum = 0;
    for (int d = 0; d < w.D; ++d) sum += w.o[d] * w.summary_d[g * width + d];
    w.summary_delta[g] = sum;
  }
  w.move(w.summary_q, w.G, w.q);
  w.move(w.summary_d, w.G, w.d_out);
  blocks_of_summary(w, [&](const Block& at) {
    for (int i = 0; i < at.lanes; ++i) w.delta[i] = w.summary_delta[at.first + i];
    attend_backward(w, at, lse + at.first, at.first == 0);
    w.move(w.o, at.lanes, w.summary_o + at.first * width);
  });
  w.move(w.dk, w.G, w.summary_dk);
  w.move(w.dv, w.G, w.summary_dv);
  for (int t = 0; t < w.T; ++t) {
    const int64_t token = w.G + int64_t(t) * w.N;
    const int also = seeing(w, t, active);
    w.read(w.qkv(b, token, h, 0), w.N, w.q);
    w.read(w.qkv(b, token, h, 1), w.N, w.k + w.G * width);
    w.read(w.qkv(b, token, h, 2), w.N, w.v + w.G * width);
    w.read(w.grad(b, token, h), w.N, w.d_out);
    __builtin_memcpy(w.lse, lse + token, w.N * sizeof(float));
    for (int i = 0; i < also; ++i) {
      w.move(w.summary_q + active[i] * width, 1, w.q + (w.N + i) * width);
      w.move(w.summary_d + active[i] * width, 1, w.d_out + (w.N + i) * width);
      w.lse[w.N + i] = lse[active[i]];
    }
    blocks(w, also, [&](const Block& at) {
      for (int i = at.patches; i < at.lanes; ++i) w.delta[i] = w.summary_delta[active[at.first + i - w.N]];
      attend_backward(w, at, w.lse + at.first, at.first == 0);
      w.write(w.o, at.patches, w.d_qkv(b, token + at.first, h, 0));
      for (int i = at.patches; i < at.lanes; ++i) w.add(w.o + i * width, 1, w.summary_o + active[at.first + i - w.N] * width);
    });
    const int64_t first = w.call.first_key;
    w.add(w.dk + first * width, w.G - first, w.summary_dk + first * width);
    w.add(w.dv + first * width, w.G - first, w.summary_dv + first * width);
    w.write(w.dk + w.G * width, w.N, w.d_qkv(b, token, h, 1));
    w.write(w.dv + w.G * width, w.N, w.d_qkv(b, token, h, 2));
  }
  w.write(w.summary_o, w.G, w.d_qkv(b, 0, h, 0));
  w.write(w.summary_dk, w.G, w.d_qkv(b, 0, h, 1));
  w.write(w.summary_dv, w.G, w.d_qkv(b, 0, h, 2));
}

int64_t workspace(const Call& call) { return Work(call, nullptr).size; }

void run(const Call& call, int64_t unit, float* memory) {
  Work w(call, memory);
  if (w.tube) return tube(w, unit);
  int* active = reinterpret_cast<int*>(w.active);
  (w.backward ? hierarchical_backward : hierarchical_forward)(w, unit / w.H, unit % w.H, active);
}

void exp2_of(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += W) store(y + i, exp2(load(x + i)));
}

}  // namespace

extern const Version version;
const Version version = {workspace, run, exp2_of};

}  // namespace VIDLA_VERSION
}  // namespace vidla
