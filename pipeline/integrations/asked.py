"""What all integrations ask: one expert, whether it stands alone or is a manager's."""

from typing import Any, NoReturn

from pipeline.asking import Asker
from pipeline.errors import ConfigError, InvalidRequestError, MissingDependencyError
from pipeline.package import ExpertPackage
from pipeline.results import InferenceResult
from pipeline.text_streams import AsyncTextStream, TextStream


class Asked:
    """One expert's ways to answer.

    Args:
        asker: An `Expert`, or an `ExpertManager`.
        name: Which of the manager's experts; `"auto"` lets each prompt decide. None for an `Expert`.

    Raises:
        ConfigError: A manager and no name; an `Expert` and a name; or neither of them.
    """

    def __init__(self, asker: Any, name: str | None = None) -> None:
        if not isinstance(asker, Asker):
            raise ConfigError(f"expert is {type(asker).__name__}", hint="Give an Expert or an ExpertManager.")
        names = getattr(asker, "experts", None)
        if (names is None) != (name is None):
            hint = "Leave the name out." if names is None else f"Give one of {', '.join((*names, 'auto'))}."
            raise ConfigError(f"{type(asker).__name__} and the name {name!r} do not go together", hint=hint)
        self._asker: Any = asker
        self._name: tuple[str, ...] = () if name is None else (name,)

    @property
    def package(self) -> ExpertPackage | None:
        """The expert's; None where a manager has it."""
        return None if self._name else self._asker.package

    @property
    def identity(self) -> dict[str, str]:
        """What tells its answers from another's: label and digest; of a manager's expert the name."""
        if (package := self.package) is None:
            return {"expert": self._name[0]}
        return {"expert": package.label, "expert_sha256": package.digest}

    def generate(self, **options: Any) -> InferenceResult:
        """As `Expert.generate`."""
        result: InferenceResult = self._asker.generate(*self._name, **options)
        return result

    def stream(self, **options: Any) -> TextStream:
        """As `Expert.generate_stream`."""
        stream: TextStream = self._asker.generate_stream(*self._name, **options)
        return stream

    async def agenerate(self, **options: Any) -> InferenceResult:
        """As `Expert.agenerate`."""
        result: InferenceResult = await self._asker.agenerate(*self._name, **options)
        return result

    def astream(self, **options: Any) -> AsyncTextStream:
        """As `Expert.agenerate_stream`."""
        stream: AsyncTextStream = self._asker.agenerate_stream(*self._name, **options)
        return stream


def checked_role(role: str, roles: dict[str, str], text: str | None, where: str) -> dict[str, str]:
    """A message of ours from another library's.

    Args:
        role: Its role there.
        roles: Our role for each role there that an expert knows.
        text: Its content; None where it is not text.
        where: What an error calls it.

    Raises:
        InvalidRequestError: An expert cannot read it.
    """
    if role not in roles or text is None:
        what = f"has the role {role!r}" if role not in roles else "is not text alone"
        raise InvalidRequestError(f"{where} {what}", hint=f"Give text, from one of: {', '.join(roles)}.")
    return {"role": roles[role], "content": text}


def raise_missing(library: str, extra: str, error: ImportError) -> NoReturn:
    """Say what to install.

    Raises:
        MissingDependencyError: Always.
    """
    raise MissingDependencyError(
        f"{library} is not installed", hint=f'Install it: pip install "expert-pipeline[{extra}]"'
    ) from error
