"""A reward read off what a causal LM would say, for plain transformers: `pipeline('text-classification', FOLDER,
trust_remote_code=True, function_to_apply='none')`. rlhf_nb, which has made this folder, needs none of it.

The score of an answer is a sum over its tokens, its end included, divided by 4. A token at t adds
    w.h[t] + (g.h[t-1] + c) * gap[t]
h being the last hidden states, and gap[t] how far the token's logit is below that of the likeliest one.
`config.reward_mean` is what the reference gets on average; it is taken off by whoever compares scores with rlhf_nb's."""
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class LogProbConfig(PretrainedConfig):
    "The configuration of the causal LM, and how it is read"
    model_type = "rlhf_nb_log_prob"

    def __init__(self, base_model_type="gpt2", answer_begins=None, reward_mean=0.0, **kw):
        for k in ("num_labels", "id2label", "label2id"):
            kw.pop(k, None)
        super().__init__(num_labels=1, **kw)
        self.base_model_type, self.reward_mean = base_model_type, reward_mean
        self.answer_begins = answer_begins  # ids behind which an answer begins; None: two texts are needed

    def of_base(self):
        "The configuration of the causal LM"
        own = "model_type", "base_model_type", "answer_begins", "reward_mean", "head", "auto_map", "architectures"
        label = "num_labels", "id2label", "label2id"
        kept = {k: v for k, v in self.to_dict().items() if k not in own + label}
        return AutoConfig.for_model(self.base_model_type, **kept)


class LogProbReward(PreTrainedModel):
    "A causal LM and a head that reads its states and logits"
    config_class = LogProbConfig
    base_model_prefix = "nothing"  # the checkpoint has the names of this class

    def __init__(self, config):
        super().__init__(config)
        self.lm = AutoModelForCausalLM.from_config(config.of_base())
        d = self.lm.get_output_embeddings().weight.shape[1]
        self.w, self.g = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.c = nn.Parameter(torch.tensor(0.4))
        self.post_init()

    def get_input_embeddings(self):
        return self.lm.get_input_embeddings()

    def get_output_embeddings(self):
        return self.lm.get_output_embeddings()

    def _begins(self, ids, kinds):
        "Where the answer begins: by the kinds of tokens where two texts were given, else behind the last mark"
        if kinds is not None and kinds.any():
            return int(kinds.nonzero()[0])
        mark = self.config.answer_begins
        if not mark:
            raise ValueError("this model does not know where an answer begins: give dict(text=question, text_pair=answer) "
                             "and return_token_type_ids=True")
        for at in range(len(ids) - len(mark), -1, -1):
            if ids[at:at + len(mark)].tolist() == mark:
                return at + len(mark)
        raise ValueError("no answer in the text: a dialogue is written by the tokenizer's chat template, with "
                         "add_generation_prompt=True, and the answer with its EOS stands behind it")

    def _score(self, ids, kinds):
        "The score of one text without padding"
        n = self._begins(ids, kinds)
        out = self.lm(ids[None], output_hidden_states=True)
        h, logits = out.hidden_states[-1][0].float(), out.logits[0, n - 1:-1].float()
        gap = logits.gather(1, ids[n:, None])[:, 0] - logits.amax(1)
        terms = h[n:] @ self.w.float() + (h[n - 1:-1] @ self.g.float() + self.c.float()) * gap
        return terms.sum() / 4

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, **_):
        "Scores (B,1); rows are read one by one, so that padding changes nothing"
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        scores = []
        for i, k in enumerate(keep.bool()):
            kinds = None if token_type_ids is None else token_type_ids[i][k]
            scores.append(self._score(input_ids[i][k], kinds))
        return SequenceClassifierOutput(logits=torch.stack(scores)[:, None])
