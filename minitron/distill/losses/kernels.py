"""The Triton kernel of a loss on logits: from the products of hidden states and heads to the loss of each token and the
gradient of the student's products, without a copy of the logits.

A row of products is read once for the log-sum-exp of its logits and once for the gradient, which is rounded as it is
written: 18 bytes per logit for both models' float32 products and a bf16 gradient. Divergences whose gradient also needs a sum
over the vocabulary (all but forward KL) read a row once more: 26 bytes. Everything else stays in registers: each lane has its
own maximum and sum, which are combined at the end of the row.

Imported only if CUDA is available (`fused.available`), or for Triton's interpreter with TRITON_INTERPRET=1.
Source: online softmax, arXiv 1805.02867 algorithm 3; the divergences' gradients are those of `divergences`.
"""

import triton
import triton.language as tl

IGNORED = tl.constexpr(-100)  # the label of a token that has no next token
LOWEST = tl.constexpr(-1e30)  # logit beyond the vocabulary: its probability is 0, and differences are not NaN
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["rows"])
def logit_loss(
    student,  # float32 [rows, size]: products hidden @ weight.T
    teacher,  # the same of the teacher; None for "none" and "top_k"
    known,  # float32 [rows]: log-sum-exp of the teacher's tempered logits, or None
    best_log_probs,  # float32 [rows, best]: log-probabilities of the teacher's top-k tokens, renormalised; or None
    best_tokens,  # int64 [rows, best]
    labels,  # int64 [rows], -100 for none; or None
    label_weight,  # float32 [1]: weight of one labelled token's cross-entropy
    gradient,  # [rows, size], any floating dtype: gradient of the weighted losses with respect to `student`
    divergences,  # float32 [rows]: T² · D
    cross_entropies,  # float32 [rows]
    rows,
    size,
    best,
    temperature,
    token_weight,  # weight of one token's divergence in the loss
    student_scale,
    student_softcap,  # or None
    teacher_scale,
    teacher_softcap,
    DIVERGENCE: tl.constexpr,
    TEMPERED: tl.constexpr,  # temperature is not 1
    BLOCK: tl.constexpr,
    BEST_BLOCK: tl.constexpr,
):
    """Rows are distributed over the programs in turn. z are the logits of a token, u = z / T."""
    lane = tl.arange(0, BLOCK)
    blocks = tl.cdiv(size, BLOCK)
    stride = size.to(tl.int64)  # a chunk may have more than 2**31 logits
    sharpness = 1.0 / temperature
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        start = row * stride
        own = student + start
        own_sum = _log_sum_exp(own, size, student_scale, student_softcap, sharpness, BLOCK)
        other, other_sum = own, own_sum
        if teacher is not None:
            other = teacher + start
            if known is None:
                other_sum = _log_sum_exp(other, size, teacher_scale, teacher_softcap, sharpness, BLOCK)
            else:
                other_sum = tl.load(known + row)

        # values of the whole row that the gradient needs
        mean, own_norm, other_norm = 0.0, 1.0, 1.0
        if DIVERGENCE == "reverse_kl" or DIVERGENCE == "jensen_shannon" or DIVERGENCE == "mse":
            # dD/du = p · (slope - Σ p · slope), and the probabilities sum to 1
            total = tl.zeros([BLOCK], tl.float32)
            for block in range(0, blocks):
                at = block * BLOCK + lane
                p = _logits(own, at, size, student_scale, student_softcap) * sharpness - own_sum
                q = _logits(other, at, size, teacher_scale, teacher_softcap) * sharpness - other_sum
                total += _divergence(p, q, 0.0, 1.0, 1.0, DIVERGENCE)[1]
            mean = tl.sum(total, 0)
        elif DIVERGENCE == "cosine":
            own_square = tl.zeros([BLOCK], tl.float32)
            other_square = tl.zeros([BLOCK], tl.float32)
            product = tl.zeros([BLOCK], tl.float32)
            for block in range(0, blocks):
                at = block * BLOCK + lane
                p = tl.exp(_logits(own, at, size, student_scale, student_softcap) * sharpness - own_sum)
                q = tl.exp(_logits(other, at, size, teacher_scale, teacher_softcap) * sharpness - other_sum)
                own_square += p * p
                other_square += q * q
                product += p * q
            own_norm = tl.sqrt(tl.sum(own_square, 0))
            other_norm = tl.sqrt(tl.sum(other_square, 0))
            mean = 1.0 - tl.sum(product, 0) / (own_norm * other_norm)

        label, weight, plain_sum = 0, 0.0, own_sum
        if labels is not None:
            label = tl.load(labels + row)
            weight = tl.where(label == IGNORED, 0.0, tl.load(label_weight))
            if TEMPERED:
                plain_sum = _log_sum_exp(own, size, student_scale, student_softcap, 1.0, BLOCK)
            labelled = _logits(own, tl.maximum(label, 0), size, student_scale, student_softcap)
            tl.store(cross_entropies + row, tl.where(label == IGNORED, 0.0, plain_sum - labelled))

        loss = tl.zeros([BLOCK], tl.float32)
        for block in range(0, blocks):
            at = (blocks - 1 - block) * BLOCK + lane  # from the end, which is still in the cache
            z = _logits(own, at, size, student_scale, student_softcap)
            slope = tl.zeros([BLOCK], tl.float32)
            p = z * sharpness - own_sum
            if DIVERGENCE == "top_k":
                slope = token_weight * temperature * tl.exp(p)
            elif DIVERGENCE != "none":
                q = _logits(other, at, size, teacher_scale, teacher_softcap) * sharpness - other_sum
                summand, slope = _divergence(p, q, mean, own_norm, other_norm, DIVERGENCE)
                loss += summand
                slope *= token_weight * temperature
            if labels is not None:
                slope += weight * (tl.exp(z - plain_sum) - tl.where(at == label, 1.0, 0.0))
            slope *= _slope(z, student_scale, student_softcap)
            tl.store(gradient + start + at, slope.to(gradient.dtype.element_ty), mask=at < size)
        distance = tl.sum(loss, 0)

        if DIVERGENCE == "top_k":
            tl.debug_barrier()  # these tokens' gradients were written with a teacher probability of 0
            few = tl.arange(0, BEST_BLOCK)
            for begin in range(0, best, BEST_BLOCK):
                chosen = begin + few < best
                at = tl.load(best_tokens + row * best + begin + few, mask=chosen, other=0)
                q = tl.load(best_log_probs + row * best + begin + few, mask=chosen, other=LOWEST)
                z = _logits(own, at, size, student_scale, student_softcap)
                p = z * sharpness - own_sum
                distance += tl.sum(tl.exp(q) * (q - p), 0)
                slope = token_weight * temperature * (tl.exp(p) - tl.exp(q))
                if labels is not None:
                    slope += weight * (tl.exp(z - plain_sum) - tl.where(at == label, 1.0, 0.0))
                slope *= _slope(z, student_scale, student_softcap)
                tl.store(gradient + start + at, slope.to(gradient.dtype.element_ty), mask=chosen)
        if DIVERGENCE != "none":
            tl.store(divergences + row, temperature * temperature * distance)


@triton.jit
def _logits(products, at, size, scale, softcap):
    """Logits of the tokens `at`, LOWEST beyond the vocabulary: softcap · tanh(scale · x / softcap) of products x."""
    inside = at < size
    logits = tl.load(products + at, mask=inside, other=0.0) * scale
    if softcap is not None:
        logits = softcap * (1.0 - 2.0 / (tl.exp(2.0 * logits / softcap) + 1.0))
    return tl.where(inside, logits, LOWEST)


@triton.jit
def _slope(logits, scale, softcap):
    """Derivative of logits with respect to products."""
    slope = scale
    if softcap is not None:
        slope = scale * (1.0 - (logits / softcap) * (logits / softcap))
    return slope


@triton.jit
def _log_sum_exp(products, size, scale, softcap, sharpness, BLOCK: tl.constexpr):
    """log Σ exp(sharpness · z) over a row, in one pass with one exponential per logit."""
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        u = _logits(products, start + lane, size, scale, softcap) * sharpness
        smaller = tl.exp(-tl.abs(u - top))
        total = tl.where(u > top, total * smaller + 1.0, total + smaller)
        top = tl.maximum(top, u)
    highest = tl.max(top, 0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))


@triton.jit
def _divergence(log_p, log_q, mean, own_norm, other_norm, DIVERGENCE: tl.constexpr):
    """Each token's summand of the divergence of the student's p from the teacher's q, and the derivative dD/du.

    mean is Σ p · dD/dp, for cosine the divergence itself; the norms |p| and |q| are only used for cosine.
    """
    p, q = tl.exp(log_p), tl.exp(log_q)
    ratio = log_p - log_q
    if DIVERGENCE == "forward_kl":
        summand = -q * ratio
        slope = p - q
    elif DIVERGENCE == "reverse_kl":
        summand = p * ratio
        slope = p * (ratio - mean)
    elif DIVERGENCE == "jensen_shannon":
        # log p / m for m = (p + q) / 2, that is ln 2 - softplus(log q / p)
        own = LN_2 - (tl.maximum(-ratio, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(ratio))))
        summand = 0.5 * (q * (own - ratio) + p * own)
        slope = p * (0.5 * own - mean)
    elif DIVERGENCE == "mse":
        summand = (p - q) * (p - q)
        slope = p * (2.0 * (p - q) - mean)
    else:
        tl.static_assert(DIVERGENCE == "cosine")
        direction = p / own_norm
        apart = direction - q / other_norm
        summand = 0.5 * apart * apart
        slope = direction * (apart - mean * direction)
    return summand, slope
